"""Corpora: disjoint splits by content, exact packing, and no silent fallback."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from healing.data.corpora import load_corpus
from healing.data.splits import SPLITS, split_documents, split_of
from healing.data.windows import batches, pack
from healing.errors import CorpusError
from healing.randomness import named_generator
from tests.conftest import SHARED_DATA

TEXTS = [f"document number {i}" for i in range(200)]


def test_splits_are_disjoint_and_complete():
    corpus = split_documents("x", TEXTS)
    parts = [set(corpus.documents[s]) for s in SPLITS]
    assert set.union(*parts) == set(TEXTS)
    assert sum(map(len, parts)) == len(TEXTS)
    assert len(corpus.documents["train"]) > 5 * len(corpus.documents["probe"])


def test_order_and_repetition_change_nothing():
    corpus = split_documents("x", TEXTS)
    again = split_documents("x", [*reversed(TEXTS), TEXTS[3], "  \n"])
    assert again.documents == corpus.documents
    assert again.digests == corpus.digests


def test_digest_follows_the_content():
    changed = split_documents("x", [*TEXTS[:-1], "something else entirely"])
    assert changed.digests != split_documents("x", TEXTS).digests


@given(st.text())
def test_a_text_has_one_split(text):
    assert split_of(text) in SPLITS
    assert split_of(text) == split_of(text)


def test_split_shares():
    counts = [split_of(f"t{i}") for i in range(20_000)]
    # Binomial: standard deviation 0.3 % for the train share, 0.2 % for the others.
    assert counts.count("train") / 20_000 == pytest.approx(0.8, abs=0.012)
    assert counts.count("probe") / 20_000 == pytest.approx(0.1, abs=0.009)


def test_stdlib_is_there_and_has_three_parts(corpus):
    assert all(sum(map(len, corpus.documents[s])) > 300_000 for s in SPLITS)
    joined = {hash(t) for t in corpus.documents["train"]}
    assert joined.isdisjoint(hash(t) for t in corpus.documents["probe"])


def test_too_few_documents():
    found = r"train 1, attack 0, probe 0; needed: one in each, 80 %, 10 %, 10 %.*give 60 documents"
    with pytest.raises(CorpusError, match=rf"has 1 document\(s\).*attack, probe empty.*{found}"):
        split_documents("x", ["only one"])


def test_empty_file(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CorpusError, match=r"empty\.txt' has 0 document"):
        load_corpus(str(tmp_path / "empty.txt"))


def test_text_file_is_split_at_blank_lines(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("\n\n".join(TEXTS))
    found = load_corpus(str(path)).documents
    assert {t.strip() for s in SPLITS for t in found[s]} == set(TEXTS)


def test_folder_of_text_files(text_files):
    found = load_corpus(str(text_files)).documents
    assert sum(len(found[s]) for s in SPLITS) == 60


def test_jsonl_and_parquet_give_the_same_corpus(tmp_path):
    import datasets

    lines = "\n".join(json.dumps({"text": t, "other": 1}) for t in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(tmp_path / "a.parquet"))
    from_jsonl = load_corpus(str(tmp_path / "a.jsonl"))
    assert from_jsonl.digests == load_corpus(str(tmp_path / "a.parquet")).digests
    assert from_jsonl.digests == split_documents("x", TEXTS).digests


def test_document_limit(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    found = load_corpus(str(tmp_path / "a.txt"), max_documents=80).documents
    assert sum(len(found[s]) for s in SPLITS) == 80


def test_jsonl_without_a_text_column(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": t}) for t in TEXTS))
    with pytest.raises(CorpusError, match=r"no column 'text' or 'content' \(it has: body\)"):
        load_corpus(str(tmp_path / "a.jsonl"))
    named = load_corpus(str(tmp_path / "a.jsonl"), text_column="body")
    assert named.digests == split_documents("x", TEXTS).digests


def test_broken_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{broken')
    with pytest.raises(CorpusError, match=r"could not be read as \.jsonl \(line 2 is not JSON"):
        load_corpus(str(tmp_path / "a.jsonl"))


def test_folder_of_several_formats(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(CorpusError, match="files of one kind"):
        load_corpus(str(tmp_path))


def test_missing_file_and_bad_name_name_the_alternatives():
    for name in ("/nowhere/text.txt", "wikitxt"):
        with pytest.raises(CorpusError, match=r"no corpus.*--corpus stdlib.*Hub dataset id"):
            load_corpus(name)


@pytest.mark.parametrize("name", ["pile", "some-owner/some-set"])
def test_unreachable_hub_is_an_error_not_a_fallback(name, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match=r"could not be loaded from the Hub.*--corpus stdlib"):
        load_corpus(name, cache_dir="")


def test_packing_is_the_token_stream_cut_in_windows(nano):
    tokenizer, texts = nano.tokenizer, TEXTS[:20]
    stream = []
    for text in texts:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    windows = pack(texts, tokenizer, 16)
    assert windows.flatten().tolist() == stream[: len(stream) // 16 * 16]
    assert windows.dtype == torch.int64
    assert tokenizer.decode(windows[0]).startswith("document number 0")


def test_packing_stops_at_the_tokens_asked_for(nano, corpus):
    windows = corpus.windows("probe", nano.tokenizer, 64, 640)
    assert windows.shape == (10, 64)
    whole = corpus.windows("probe", nano.tokenizer, 64)
    assert torch.equal(windows, whole[:10])


def test_too_little_text(nano):
    corpus = split_documents("small", TEXTS)
    with pytest.raises(CorpusError, match=r"probe split of corpus 'small'.*where 4096 are needed"):
        corpus.windows("probe", nano.tokenizer, 64, 4096)


def test_batches_visit_every_window_once_per_epoch():
    windows = torch.arange(12).view(6, 2)
    stream = batches(windows, 2, named_generator(0, "order"))
    epochs = [torch.cat([next(stream) for _ in range(3)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0].tolist()) == windows[:, 0].tolist()
    assert not torch.equal(*epochs)
    with pytest.raises(CorpusError, match="cannot fill a batch of 7"):
        next(batches(windows, 7, named_generator(0, "order")))


def test_real_text_from_disk(nano):
    path = SHARED_DATA / "wikitext-2" / "valid.txt"
    if not path.is_file():
        pytest.skip(f"WikiText-2 is not at {path}")
    corpus = load_corpus(str(path))
    assert len(corpus.windows("train", nano.tokenizer, 128)) > 1000
    assert len(corpus.windows("probe", nano.tokenizer, 128, 4096)) == 32
