"""Windows: special tokens are text, a beginning-of-sequence token, long documents."""

from __future__ import annotations

import pytest
import torch
import transformers
from tokenizers import AddedToken, processors

from healing.data import windows
from healing.data.windows import ChatText, opening, pack
from healing.errors import CorpusError
from healing.models.model_files import EMBEDDED_DIR


@pytest.fixture
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Nano's, with a special token beyond its 2,048 ids."""
    found = transformers.AutoTokenizer.from_pretrained(EMBEDDED_DIR / "nano")
    found.add_tokens([AddedToken("<picture>", special=True)])
    return found


def with_beginning(tokenizer, token: str) -> transformers.PreTrainedTokenizerBase:
    """The same tokenizer, putting a token in front of a text as Llama 2's does."""
    tokenizer.bos_token = token
    number = tokenizer.convert_tokens_to_ids(token)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, number)]
    )
    return tokenizer


def test_what_spells_a_special_token_is_text(tokenizer):
    end, spelled = tokenizer.eos_token_id, tokenizer.eos_token
    text = f"one {spelled} two <picture> three"
    packed = pack([text] * 3, tokenizer, 8).flatten()
    assert int(packed.max()) < 2048
    # End-of-text stands between the documents alone: what lies between is each document, whole.
    first = packed.tolist().index(end)
    assert tokenizer.decode(packed[:first]) == text
    assert packed.tolist().count(end) in (2, 3)  # the last may fall off with its window


def test_special_tokens_of_a_chat_are_special_tokens(tokenizer):
    packed = pack([ChatText(f"one {tokenizer.eos_token} two <picture>")] * 4, tokenizer, 8)
    assert packed.flatten().tolist().count(2048) >= 3
    assert packed.flatten().tolist().count(tokenizer.eos_token_id) >= 6


def test_a_beginning_token_is_in_every_window(tokenizer):
    texts = [f"document number {i} of many" for i in range(30)]
    plain = pack(texts, tokenizer, 16)
    assert opening(tokenizer) == []
    begun = with_beginning(tokenizer, "<picture>")
    assert opening(begun) == [2048]
    packed = pack(texts, begun, 16)
    assert packed.dtype == torch.int64
    assert (packed[:, 0] == 2048).all()
    assert (packed[:, 1:] != 2048).all()
    # Behind it stands the same stream of tokens, 15 in a window instead of 16.
    stream = plain.flatten()
    assert torch.equal(packed[:, 1:].flatten()[: len(stream)], stream[: packed[:, 1:].numel()])
    assert pack(texts, begun, 16, 64).shape == (4, 16)


def test_a_tokenizer_that_has_the_token_and_does_not_put_it_in_front(tokenizer):
    tokenizer.bos_token = "<picture>"
    assert opening(tokenizer) == []


class Counted:
    """A tokenizer that counts the characters it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, **options):
        self.characters += sum(map(len, text)) if isinstance(text, list) else len(text)
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("count", [1, 40])
def test_a_long_document_is_tokenized_as_far_as_needed(tokenizer, count):
    text = " ".join(f"word{i} and, some more;\n" for i in range(60_000))
    whole = pack([text], tokenizer, 64)
    counted = Counted(tokenizer)
    part = pack([text] * count, counted, 64, 640)
    assert torch.equal(part, whole[:10])
    assert counted.characters < 20_000 < len(text) / 50


@pytest.mark.parametrize("text", ["a" * 90_000, " " * 90_000, "ab " * 40_000, "\u3042" * 90_000])
def test_text_without_words_is_cut_the_same_way(tokenizer, text):
    whole = pack([text], tokenizer, 64)
    assert torch.equal(pack([text], tokenizer, 64, 256), whole[:4])


def test_tokens_of_many_characters_take_a_second_try(tokenizer, monkeypatch):
    monkeypatch.setattr(windows, "CHARACTERS_PER_TOKEN", 1)
    text = " ".join(f"word{i}" for i in range(5000))
    assert torch.equal(pack([text], tokenizer, 64, 640), pack([text], tokenizer, 64)[:10])


def test_a_short_text_after_a_long_one(tokenizer):
    texts = ["short", "long text " * 5000, "end"]
    stream = pack(texts, tokenizer, 8).flatten()
    assert torch.equal(pack(texts, tokenizer, 8, 8192).flatten(), stream[:8192])
    with pytest.raises(CorpusError, match="tokens where 1000000 are needed"):
        pack(texts, tokenizer, 8, 1_000_000)


def test_a_python_tokenizer_reads_special_tokens_as_text_too():
    """Byte-level tokenizers of transformers have no Rust half."""
    tokenizer = transformers.ByT5Tokenizer()
    ids = pack([f"a{tokenizer.eos_token}b"] * 4, tokenizer, 4).flatten().tolist()
    assert ids.count(tokenizer.eos_token_id) <= 4
    assert "</s>" in tokenizer.decode([i for i in ids if i != tokenizer.eos_token_id])


def test_the_embedded_tokenizers_begin_with_nothing(nano):
    assert opening(nano.tokenizer) == []


def test_tokens_beside_a_cut_are_not_used(tokenizer, monkeypatch):
    """Wherever the cut falls, and however little more than needed comes before it."""
    monkeypatch.setattr(windows, "CHARACTERS_PER_TOKEN", 1)
    text = " return some_value, encoding" * 400
    whole = tokenizer(text)["input_ids"]
    for needed in range(1, 160):
        found = pack([text], tokenizer, 1, needed).flatten().tolist()
        assert found == whole[:needed], needed


def test_chats_and_plain_texts_beside_each_other_are_each_read_as_what_they_are(tokenizer):
    """In one call of the tokenizer's 64: what spells the end of text is one token in a chat."""
    end = tokenizer.eos_token
    plain, chat = f"a {end} b", ChatText(f"a {end} b")
    alone = [windows._encode([text], tokenizer)[0] for text in (plain, chat)]
    assert alone[0] != alone[1]
    assert windows._encode([plain, chat, chat, plain], tokenizer) == [
        alone[0], alone[1], alone[1], alone[0]
    ]  # fmt: skip
