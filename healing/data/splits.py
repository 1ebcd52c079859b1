"""Three disjoint parts of a corpus, told apart by the hash of each document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from healing.data.windows import opening, pack
from healing.errors import CorpusError
from healing.progress import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS = ("train", "attack", "probe")
SPLIT_BOUNDS = {"train": (0.0, 0.8), "attack": (0.8, 0.9), "probe": (0.9, 1.0)}


ENOUGH_DOCUMENTS = 60
"""With so many a split of a tenth is empty once in 500 corpora (0.9⁶⁰ = 0.0018)."""


def shares() -> str:
    """How the documents are divided, in words."""
    return ", ".join(f"{100 * (high - low):.0f} %" for low, high in SPLIT_BOUNDS.values())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def split_of(text: str) -> str:
    """Split a document belongs to, by the first 52 bits of its SHA-256 as a uniform number."""
    position = int(_hash(text)[:13], 16) / 16**13
    return next(name for name, (low, high) in SPLIT_BOUNDS.items() if low <= position < high)


def split_documents(name: str, texts: Iterable[str]) -> Corpus:
    """Assign texts to their splits; duplicates count once, blank texts are dropped.

    Raises:
        CorpusError: A split is left without a document.
    """
    by_hash = {_hash(text): text for text in counted(texts) if text.strip()}
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for key in sorted(by_hash):
        parts[split_of(by_hash[key])].append(by_hash[key])
    if empty := [split for split in SPLITS if not parts[split]]:
        found = ", ".join(f"{split} {len(parts[split])}" for split in SPLITS)
        raise CorpusError(
            f"corpus {name!r} has {len(by_hash)} document(s), which leaves the split "
            f"{', '.join(empty)} empty (found: {found}; needed: one in each, {shares()} of the "
            f"documents go there): give {ENOUGH_DOCUMENTS} documents or more; in text files blank "
            "lines part them, --split-rule line makes one of every line"
        )
    digests = {s: _hash("".join(_hash(text) for text in parts[s]))[:16] for s in SPLITS}
    return Corpus(name, {s: tuple(parts[s]) for s in SPLITS}, digests)


@dataclass(frozen=True)
class Corpus:
    """Documents by split.

    Attributes:
        name: What the user asked for.
        documents: Split name → texts, ordered by content hash.
        digests: Split name → hash of the split's texts (16 hex digits).
    """

    name: str
    documents: dict[str, tuple[str, ...]]
    digests: dict[str, str]
    _packed: dict[tuple[object, ...], torch.Tensor] = field(
        default_factory=dict, compare=False, repr=False
    )

    def windows(
        self,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        max_tokens: int | None = None,
    ) -> torch.Tensor:
        """Packed windows of a split (see :func:`pack`), kept for the next caller.

        Returns:
            int64 (windows, length); shared, not to be changed in place.

        Raises:
            CorpusError: The split is too small.
        """
        words = (tokenizer.name_or_path, len(tokenizer), *opening(tokenizer))
        key = (split, words, length, max_tokens)
        if key not in self._packed:
            try:
                self._packed[key] = pack(self.documents[split], tokenizer, length, max_tokens)
            except CorpusError as error:
                count, total = len(self.documents[split]), sum(map(len, self.documents.values()))
                raise CorpusError(
                    f"{split} split of corpus {self.name!r} ({count} of its {total} documents): "
                    f"{error}"
                ) from error
        return self._packed[key]
