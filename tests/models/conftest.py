"""Tiny models, made on the spot."""

from __future__ import annotations

import pathlib

import pytest

from tests.models.gguf_files import give_tokenizer, small_llama, write_gguf


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A small Llama in transformers' format."""
    small_llama().save_pretrained(tmp_path / "model")
    return give_tokenizer(tmp_path / "model")


@pytest.fixture
def gguf_path(tmp_path) -> pathlib.Path:
    """The same in 4-bit numbers, in a folder of its own."""
    pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    (tmp_path / "quantized").mkdir()
    write_gguf(tmp_path / "quantized" / "tiny.Q4_1.gguf", small_llama())
    return tmp_path / "quantized" / "tiny.Q4_1.gguf"
