"""Clean text: where it comes from, its three disjoint splits, and packed token windows.

A corpus is a sequence of documents. Each document belongs to ``train`` (fine-tuning), ``attack``
(curvature and text controls) or ``probe`` (measurement) by the hash of its *text*, so a text that
occurs twice cannot be in two splits and the order of the source does not matter.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any

import huggingface_hub
import zstandard
from huggingface_hub import is_offline_mode

from healing.config.shared import BLANK_LINES
from healing.data.columns import Flatten, Table, texts_of
from healing.data.hub import CONNECTION_ERRORS, refusal
from healing.data.local_files import text_file
from healing.data.readers import local_documents
from healing.data.splits import Corpus, split_documents
from healing.errors import CorpusError

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


def _rows(dataset: Iterable[dict[str, Any]], name: str) -> Table:
    return Table(name, "row", enumerate(dataset, 1))


def _which_configuration(dataset_id: str, error: BaseException) -> str:
    """What to write where a data set has several configurations and none is named, else nothing."""
    found = re.search(r"Config name is missing.*?available configs: \[(.*?)\]", str(error), re.S)
    if not found:
        return ""
    names = re.findall(r"'([^']*)'", found[1])
    shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
    return f"it has {len(names)} configurations ({shown}): name one, as {dataset_id}:{names[0]}"


def _hub_documents(name: str, limit: int, column: str, flatten: Flatten | None) -> list[str]:
    import datasets

    dataset_id, _, configuration = name.partition(":")
    datasets.config.STREAMING_READ_MAX_RETRIES = STREAM_ATTEMPTS
    try:
        huggingface_hub.HfApi().dataset_info(dataset_id)  # the stream would be retried for minutes
        dataset = datasets.load_dataset(
            dataset_id, configuration or None, split="train", streaming=True
        )
        return list(itertools.islice(texts_of([_rows(dataset, name)], column, flatten), limit))
    except CorpusError:
        raise
    except (
        *CONNECTION_ERRORS,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        zstandard.ZstdError,
    ) as error:
        reason = _which_configuration(dataset_id, error)
        reason = reason or refusal(error, "dataset", dataset_id)
        if is_offline_mode():
            reason = "HF_HUB_OFFLINE forbids the network, and streamed text is not kept"
        raise CorpusError(
            f"dataset {name!r} could not be loaded from the Hub ({reason}): {ALTERNATIVES}"
        ) from error


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


def load_corpus(
    name: str,
    max_documents: int = 20_000,
    text_column: str = "",
    split_rule: str = BLANK_LINES,
    flatten: Flatten | None = None,
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
        texts = _hub_documents(source, max_documents, text_column, flatten)
    return split_documents(name, texts)
