"""Clean text: where it comes from, its three disjoint splits, and packed token windows.

A corpus is a sequence of documents. Each document belongs to ``train`` (fine-tuning), ``attack``
(curvature and text controls) or ``probe`` (measurement) by the hash of its *text*, so a text that
occurs twice cannot be in two splits and the order of the source does not matter.
"""

from __future__ import annotations

import itertools
import pathlib
import re
import sysconfig
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import huggingface_hub
import zstandard
from huggingface_hub import is_offline_mode

from healing.data.hub import CONNECTION_ERRORS, refusal
from healing.data.splits import Corpus, split_documents
from healing.errors import CorpusError

if TYPE_CHECKING:
    pass

PILE_ID = "monology/pile-uncopyrighted"
LOCAL_FORMATS = {".txt": "text", ".jsonl": "json", ".jsonl.zst": "json", ".parquet": "parquet"}
BLANK_LINES = re.compile(r"\n[ \t]*\n")
ALTERNATIVES = (
    "use --corpus stdlib (no network), a local .txt, .jsonl, .jsonl.zst or .parquet file or "
    "folder, pile, or a Hub dataset id such as owner/name or owner/name:configuration"
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


def _text_column(row: dict[str, Any], name: str) -> str:
    for candidate in ("text", "content"):
        if candidate in row:
            return candidate
    raise CorpusError(
        f"corpus {name!r} has no column 'text' or 'content' (it has: {', '.join(row)}): "
        "rename the column that holds the documents"
    )


def _take(dataset: Iterable[dict[str, Any]], name: str, limit: int) -> list[str]:
    rows = iter(dataset)
    first = next(rows, None)
    if first is None:
        return []
    column = _text_column(first, name)
    texts = (str(row[column]) for row in itertools.chain([first], rows))
    return list(itertools.islice(texts, limit))


def _suffix(name: str) -> str:
    """The ending of a file's name that :data:`LOCAL_FORMATS` knows, or nothing."""
    return next((ending for ending in LOCAL_FORMATS if name.endswith(ending)), "")


def _local_documents(path: pathlib.Path, limit: int) -> list[str]:
    import datasets

    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    files = [p for p in files if _suffix(p.name)]
    formats = {_suffix(p.name) for p in files}
    if not files or len(formats) > 1:
        found, expected = ", ".join(sorted(formats)) or "no such file", ", ".join(LOCAL_FORMATS)
        raise CorpusError(f"{path}: expected {expected} files of one kind, found {found}")
    suffix = formats.pop()
    try:
        dataset = datasets.load_dataset(
            LOCAL_FORMATS[suffix],
            data_files=[str(p) for p in files],
            split="train",
            streaming=True,
            **({"sample_by": "document"} if suffix == ".txt" else {}),
        )
        texts = _take(dataset, str(path), limit)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, zstandard.ZstdError) as error:
        raise CorpusError(f"{path} could not be read as {suffix}: {error}") from error
    # In one text file blank lines part the documents; in a folder of texts each file is one.
    one_text = suffix == ".txt" and path.is_file()
    return BLANK_LINES.split("\n".join(texts))[:limit] if one_text else texts


def _which_configuration(dataset_id: str, error: BaseException) -> str:
    """What to write where a data set has several configurations and none is named, else nothing."""
    found = re.search(r"Config name is missing.*?available configs: \[(.*?)\]", str(error), re.S)
    if not found:
        return ""
    names = re.findall(r"'([^']*)'", found[1])
    shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
    return f"it has {len(names)} configurations ({shown}): name one, as {dataset_id}:{names[0]}"


def _hub_documents(name: str, limit: int) -> list[str]:
    import datasets

    dataset_id, _, configuration = name.partition(":")
    datasets.config.STREAMING_READ_MAX_RETRIES = STREAM_ATTEMPTS
    try:
        huggingface_hub.HfApi().dataset_info(dataset_id)  # the stream would be retried for minutes
        dataset = datasets.load_dataset(
            dataset_id, configuration or None, split="train", streaming=True
        )
        return _take(dataset, name, limit)
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


def load_corpus(name: str, max_documents: int = 20_000) -> Corpus:
    """Load and split a corpus; nothing is ever substituted for what was asked.

    Args:
        name: ``stdlib``, ``pile``, a local file or folder, or a Hub dataset id, with ``:`` and a
            configuration where it has several.
        max_documents: Upper bound on documents read (streams stop there).

    Raises:
        CorpusError: It cannot be loaded; the message names the alternatives.
    """
    path = pathlib.Path(name).expanduser()
    looks_local = bool(_suffix(name)) or name.startswith((".", "/", "~"))
    if name == "stdlib":
        texts: Iterable[str] = list(_stdlib_documents())[:max_documents]
    elif path.exists():
        texts = _local_documents(path, max_documents)
    elif looks_local or (name != "pile" and name.count("/") != 1):
        raise CorpusError(f"no corpus {name!r} (no such file, and not a Hub id): {ALTERNATIVES}")
    else:
        texts = _hub_documents(PILE_ID if name == "pile" else name, max_documents)
    return split_documents(name, texts)
