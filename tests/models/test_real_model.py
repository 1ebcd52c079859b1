"""A real model from a GGUF file (``make real-model``): it loads, reads English, and is in parts."""

from __future__ import annotations

import math

import pytest

from healing.data.windows import opening, pack
from healing.measurements.probe import Probe
from healing.models.blocks import block_matrices, transformer_blocks
from healing.models.loading import LoadedModel, load_model
from healing.models.token_loss import plain_head
from tests.models import real_model

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

TEXT = (
    "The river rises in the hills north of the town and flows south for about forty miles before "
    "it reaches the sea. In the nineteenth century several mills were built along its banks, and "
    "the railway that followed made the valley one of the most important centres of the trade. "
    "Today most of the old buildings are used as museums, and the path beside the water is popular "
    "with visitors during the summer. "
)


@pytest.fixture(scope="module")
def real() -> LoadedModel:
    pytest.importorskip("gguf", reason="the extra [gguf] is not installed")
    if not real_model.place().is_file():
        pytest.skip(f"{real_model.place()} is not there: make real-model fetches it")
    return load_model(str(real_model.place()))


def test_the_real_model_is_whole_and_reads_english(real):
    assert real.n_params == real_model.PARAMETERS
    assert real.tags["dequantized_from"] == "Q4_1"
    assert len(transformer_blocks(real.model)) == 30
    assert len(block_matrices(real.model)) == 30 * 7
    assert plain_head(real.model) is not None
    assert opening(real.tokenizer) == []
    windows = pack([TEXT], real.tokenizer, 64)
    # English prose that it has never seen: about 15; its 49,152 tokens by chance would be 49,152.
    assert 5 < math.exp(Probe(windows).measure(real.model).loss) < 40


def test_a_role_mark_in_a_document_is_text(real):
    mark = real.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert mark == 1
    ids = pack(["a <|im_start|> b"] * 9, real.tokenizer, 8).flatten().tolist()
    assert mark not in ids
    assert "<|im_start|>" in real.tokenizer.decode(ids)
