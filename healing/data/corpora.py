"""Clean text: where it comes from, its three disjoint splits, and packed token windows.

A corpus is a sequence of documents. Each document belongs to ``train`` (fine-tuning), ``attack``
(curvature and text controls) or ``probe`` (measurement) by the hash of its *text*, so a text that
occurs twice cannot be in two splits and the order of the source does not matter.
"""

from __future__ import annotations

import itertools
import logging
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator

import zstandard
from huggingface_hub import is_offline_mode

from healing.config.shared import BLANK_LINES, CACHE_DIR
from healing.data.columns import Flatten, Table, texts_of
from healing.data.hub import CONNECTION_ERRORS, first_line, refusal
from healing.data.kept_rows import Row, Wanted, commit_of, is_unreachable, pin, row_cache
from healing.data.local_files import text_file
from healing.data.readers import local_documents
from healing.data.splits import Corpus, split_documents
from healing.errors import CorpusError

logger = logging.getLogger(__name__)

PILE_ID = "monology/pile-uncopyrighted"
ALTERNATIVES = (
    "use --corpus stdlib (no network), a local file or folder (.txt, .jsonl, .parquet …), pile, or "
    "a Hub dataset id such as owner/name or owner/name:configuration"
)
STREAM_ATTEMPTS = 1
"""Reads of a broken stream; each is retried by the Hub's client for half a minute."""

# Parts of the standard library that many distributions leave out or that are not prose-like code
# (character tables), so that one Python version gives one corpus wherever it was installed from.
STDLIB_EXCLUDED = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "distutils",
        "ensurepip",
        "turtledemo",
        "encodings",
        "tkinter",
        "__pycache__",
    ]
)


def _stdlib_documents() -> Iterator[str]:
    from pydoc_data import topics

    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        generated = path.name.startswith(("_sysconfigdata", "topics"))
        if (
            STDLIB_EXCLUDED.isdisjoint(parts)
            and not parts[0].startswith("config-")
            and not generated
        ):
            # A few sources declare another encoding; what is not UTF-8 there is not our text.
            yield path.read_text(encoding="utf-8", errors="ignore")
    yield from topics.topics.values()


def _which_configuration(dataset_id: str, error: BaseException) -> str:
    """What to write where a data set has several configurations and none is named, else nothing."""
    found = re.search(r"Config name is missing.*?available configs: \[(.*?)\]", str(error), re.S)
    if not found:
        return ""
    names = re.findall(r"'([^']*)'", found[1])
    shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
    return f"it has {len(names)} configurations ({shown}): name one, as {dataset_id}:{names[0]}"


def _unavailable(name: str, error: BaseException) -> CorpusError:
    dataset_id = name.partition(":")[0]
    reason = _which_configuration(dataset_id, error) or refusal(error, "dataset", dataset_id)
    if is_offline_mode():
        reason = (
            "HF_HUB_OFFLINE forbids the network, and no text of it was kept for the same "
            "--max-documents and --text-column"
        )
    return CorpusError(
        f"dataset {name!r} could not be loaded from the Hub ({reason}): {ALTERNATIVES}"
    )


def _streamed_rows(name: str, wanted: Wanted, commit: str) -> Iterator[Row]:
    import datasets

    datasets.config.STREAMING_READ_MAX_RETRIES = STREAM_ATTEMPTS
    try:
        yield from datasets.load_dataset(
            wanted.dataset,
            wanted.configuration or None,
            split="train",
            streaming=True,
            revision=commit,
        )
    except (
        *CONNECTION_ERRORS,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        zstandard.ZstdError,
    ) as error:
        raise _unavailable(name, error) from error


def _hub_documents(
    name: str, limit: int, column: str, flatten: Flatten | None, cache_dir: str
) -> list[str]:
    dataset_id, _, configuration = name.partition(":")
    wanted = Wanted(dataset_id, configuration, column, limit)
    cache = row_cache(cache_dir)

    def texts(rows: Iterable[Row]) -> list[str]:
        table = Table(name, "row", enumerate(rows, 1))
        return list(itertools.islice(texts_of([table], column, flatten), limit))

    try:
        commit = commit_of(dataset_id)
    except CONNECTION_ERRORS as error:
        kept = cache.newest(wanted) if is_unreachable(error) else None
        if kept is None:
            raise _unavailable(name, error) from error
        if not is_offline_mode():
            logger.warning(
                f"the Hub cannot be asked for dataset {name!r} ({first_line(error)}): its text is "
                f"the one used last, of commit {kept[0]}"
            )
        pin(dataset_id, kept[0])
        return texts(kept[1])
    except ValueError as error:
        raise _unavailable(name, error) from error
    return cache.texts(wanted, commit, lambda: _streamed_rows(name, wanted, commit), texts)


def _path(name: str) -> pathlib.Path:
    return pathlib.Path(os.path.expanduser(name))  # an unknown user stays as it is written


def require_named(name: str) -> None:
    """Check that a name can be that of a corpus: no text is read, and nobody is asked.

    Raises:
        CorpusError: It is empty, or neither a file or folder that is there nor a Hub id.
    """
    if not name.strip():
        raise CorpusError(f"--corpus is empty: {ALTERNATIVES}")
    path = _path(name)
    if name in ("stdlib", "pile") or os.path.lexists(path):
        return
    looks_local = name.startswith((".", "/", "~")) or text_file(path) is not None
    if looks_local or name.count("/") != 1:
        raise CorpusError(f"no corpus {name!r} (no such file, and not a Hub id): {ALTERNATIVES}")


def dataset_of(name: str) -> str:
    """The Hub's data set that a corpus is; empty = it comes from elsewhere.

    Raises:
        CorpusError: See :func:`require_named`.
    """
    require_named(name)
    if name == "stdlib" or os.path.lexists(_path(name)):
        return ""
    return PILE_ID if name == "pile" else name.partition(":")[0]


def load_corpus(
    name: str,
    max_documents: int = 20_000,
    text_column: str = "",
    split_rule: str = BLANK_LINES,
    flatten: Flatten | None = None,
    cache_dir: str = CACHE_DIR,
) -> Corpus:
    """Load and split a corpus; nothing is ever substituted for what was asked.

    Args:
        name: ``stdlib``, ``pile``, a local file or folder, or a Hub dataset id, with ``:`` and a
            configuration where it has several.
        max_documents: Upper bound on documents read (streams stop there).
        text_column: Of data with columns, the one that holds the documents; empty = ``text`` or
            ``content``.
        split_rule: What parts the documents of local text files, see
            :func:`healing.data.readers.local_documents`.
        flatten: Makes one text of a chat, where ``text_column`` names a column of chats.
        cache_dir: Folder that keeps what was streamed from the Hub; empty = nothing is kept.

    Raises:
        CorpusError: It cannot be loaded; the message names the alternatives.
    """
    require_named(name)
    path = _path(name)
    if name == "stdlib":
        texts: Iterable[str] = itertools.islice(_stdlib_documents(), max_documents)
    elif os.path.lexists(path):
        found = local_documents(path, column=text_column, split_rule=split_rule, flatten=flatten)
        texts = itertools.islice(found, max_documents)
    else:
        source = PILE_ID if name == "pile" else name
        texts = _hub_documents(source, max_documents, text_column, flatten, cache_dir)
    return split_documents(name, texts)
