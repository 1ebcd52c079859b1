"""GGUF files as transformers reads them, without what takes it minutes of a person's time.

transformers parses the whole vocabulary once for the configuration, again for the tokenizer and
again for the weights, number by number through memory-mapped arrays, asks anew for the names of all
tensors at each of a model's modules, and draws a bar of its own that nothing switches off.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Iterator
from typing import Any
from unittest import mock

from healing.progress import phase

_LOCK = threading.RLock()
_open = 0


@contextlib.contextmanager
def read_once() -> Iterator[None]:
    """Inside, a file's header is parsed once, and the tensors that are read are a phase. What was
    parsed is forgotten at the end of the outermost block: it takes 100 MB.
    """
    global _open
    with _LOCK:
        if _open:
            yield
            return
        with contextlib.ExitStack() as patches:
            _open += 1
            patches.callback(_close)
            for patch in _patches():
                patches.enter_context(patch)
            yield


def _close() -> None:
    global _open
    _open -= 1


def _patches() -> Iterator[Any]:
    import gguf
    import numpy as np
    from transformers import modeling_gguf_pytorch_utils as reading

    class Reader(gguf.GGUFReader):
        """Slices of a plain array are made several times faster than those of a mapped file."""

        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(np.ndarray)

    @functools.lru_cache(maxsize=1)
    def read(path: str, changed: float) -> Reader:
        return Reader(path)

    def opened(path: str | os.PathLike[str], mode: str = "r") -> Reader:
        return read(str(path), os.stat(path).st_mtime)

    def told(tensors: list[Any], **_: Any) -> Iterator[Any]:
        return phase("dequantizing", tensors, len(tensors))

    names = functools.cache(gguf.get_tensor_name_map)
    yield mock.patch.object(gguf, "GGUFReader", opened)
    yield mock.patch.object(gguf, "get_tensor_name_map", names)
    yield mock.patch.object(reading, "tqdm", told)
