"""Text as people have it: kinds of files and folders that are read, and how others are refused."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pathlib
import random
import re

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard

from healing.data.corpora import load_corpus
from healing.data.readers import _BLANK as BLANK
from healing.data.readers import _PIECE, _paragraphs, local_documents
from healing.data.splits import split_documents
from healing.data.windows import ChatText
from healing.errors import CorpusError

TEXTS = [f"Note {i}, naïve: " + "river stone garden " * 3 + "end" for i in range(120)]
EXPECTED = split_documents("x", TEXTS).digests


def json_lines(texts=TEXTS) -> str:
    return "\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(texts))


def documents(path: pathlib.Path, **options) -> list[str]:
    return list(local_documents(path, **options))


PACKERS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
PLAIN = {
    ".txt": "\n\n".join(TEXTS),
    ".TXT": "\n\n".join(TEXTS),
    ".md": "\n \t\n".join(TEXTS),
    ".jsonl": json_lines(),
    ".ndjson": json_lines(),
    ".json": json.dumps([{"text": t} for t in TEXTS]),
    ".csv": "id,text\n" + "\n".join(f'{i},"{t}"' for i, t in enumerate(TEXTS)),
    ".tsv": "id\ttext\n" + "\n".join(f"{i}\t{t}" for i, t in enumerate(TEXTS)),
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ending", PLAIN)
def test_text_json_and_tables_with_and_without_compression(tmp_path, ending, packing):
    path = tmp_path / f"part{ending}{packing}"
    path.write_bytes(PACKERS[packing](PLAIN[ending].encode()))
    assert load_corpus(str(path)).digests == EXPECTED


@pytest.mark.parametrize("ending", PLAIN)
def test_byte_order_mark_and_windows_line_ends(tmp_path, ending):
    path = tmp_path / f"part{ending}"
    path.write_bytes(b"\xef\xbb\xbf" + PLAIN[ending].replace("\n", "\r\n").encode())
    assert load_corpus(str(path)).digests == EXPECTED


def test_columnar_files_and_saved_data_sets(tmp_path):
    data = datasets.Dataset.from_dict({"n": list(range(120)), "text": TEXTS})
    data.to_parquet(str(tmp_path / "a.parquet"))
    pyarrow.feather.write_feather(data.data.table, tmp_path / "file.arrow", compression="zstd")
    data.save_to_disk(str(tmp_path / "saved"))
    stream = next((tmp_path / "saved").glob("*.arrow"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(
        str(tmp_path / "splits")
    )
    for name in ("a.parquet", "file.arrow", f"saved/{stream.name}", "saved", "splits"):
        assert load_corpus(str(tmp_path / name)).digests == EXPECTED, name


def test_a_saved_data_set_without_a_train_split_or_damaged(tmp_path):
    data = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(CorpusError, match=r"holds the splits a, b and no train: name one.*two/a"):
        documents(tmp_path / "two")
    assert documents(tmp_path / "two" / "a") == TEXTS
    (tmp_path / "two" / "a" / "state.json").write_text("{}")
    with pytest.raises(CorpusError, match=r"two/a could not be read as a data set saved by"):
        documents(tmp_path / "two" / "a")


@pytest.mark.parametrize("name", ["data[1]", "data*", "data?", "{a,b}", "**", "[!a]"])
def test_paths_are_not_patterns(tmp_path, name):
    for folder, text in ((name, "MINE"), ("data1", "OTHER"), ("a", "OTHER")):
        (tmp_path / folder).mkdir()
        for ending in (".jsonl", ".txt"):
            (tmp_path / folder / f"x{ending}").write_text(json.dumps({"text": text}))
        datasets.Dataset.from_dict({"text": [text]}).to_parquet(
            str(tmp_path / folder / "x.parquet")
        )
    assert documents(tmp_path / name / "x.jsonl") == ["MINE"]
    assert documents(tmp_path / name / "x.parquet") == ["MINE"]
    assert documents(tmp_path / name / "x.txt") == ['{"text": "MINE"}']


def test_a_folder_is_split_like_one_file(tmp_path):
    (tmp_path / "b.txt").write_text("\n\n".join(TEXTS[60:]))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.TXT").write_text("\n\n".join(TEXTS[:60]))
    assert load_corpus(str(tmp_path)).digests == EXPECTED


def test_hidden_files_links_out_and_papers_beside_data_are_left_out(tmp_path):
    folder = tmp_path / "texts"
    for place in (".git", "sub/.cache", "sub"):
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "a.jsonl").write_text(json.dumps({"text": place}))
    (folder / ".b.jsonl").write_text(json.dumps({"text": "hidden"}))
    (folder / "README.md").write_text("about")
    (folder / "dataset_infos.json").write_text("{}")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.jsonl").write_text(json.dumps({"text": "outside"}))
    (folder / "link.jsonl").symlink_to(tmp_path / "outside" / "x.jsonl")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "dangling.jsonl").symlink_to(tmp_path / "nowhere")
    (folder / "inside.jsonl").symlink_to(folder / "sub" / "a.jsonl")
    assert documents(folder) == ["sub", "sub"]
    (tmp_path / "named").symlink_to(folder)  # one that is named is followed
    assert documents(tmp_path / "named") == ["sub", "sub"]


def test_a_folder_without_text_or_with_several_kinds(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a.jpg").write_text("")
    (tmp_path / "y.txt").write_text("a")
    (tmp_path / "x" / "l.txt").symlink_to(tmp_path / "y.txt")
    with pytest.raises(CorpusError, match=r"x holds no text: 1 files of other.*1 symbolic links"):
        documents(tmp_path / "x")
    (tmp_path / "z.csv").write_text("text\na")
    with pytest.raises(CorpusError, match=r"one kind, found 2 \.txt, first .*l\.txt; 1 \.csv"):
        documents(tmp_path)


@pytest.mark.parametrize("ending", [*PLAIN, ".txt.gz", ".parquet", ".arrow"])
def test_an_empty_file_is_zero_documents(tmp_path, ending):
    path = tmp_path / f"empty{ending}"
    path.write_bytes(gzip.compress(b"") if ending.endswith(".gz") else b"")
    with pytest.raises(CorpusError, match=r"has 0 document\(s\).*give 60 documents or more"):
        load_corpus(str(path))


@pytest.mark.parametrize(("codec", "byte", "named"), [
    ("windows-1252", 200_010, "WINDOWS-1252"),
    ("utf-16", 0, "UTF-16"),
])  # fmt: skip
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_another_encoding_says_where_and_what_to_run(tmp_path, codec, byte, named, packing):
    path = tmp_path / f"my notes.txt{packing}"
    path.write_bytes(PACKERS[packing](("a" * 200_010 + "é" + "b" * 90_000).encode(codec)))
    quoted = re.escape(f"'{path}'")
    with pytest.raises(CorpusError, match=rf"\(byte {byte}\).*iconv -f {named} -t UTF-8 {quoted}"):
        documents(path)


def test_a_character_across_two_reads_is_no_bad_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * ((1 << 20) - 1) + "é".encode() + b"\xff")
    with pytest.raises(CorpusError, match=rf"\(byte {(1 << 20) + 1}\)"):
        documents(path)


def test_utf16_without_a_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("some text".encode("utf-16-le"))
    for rule in ("blank_lines", "line", "file"):
        with pytest.raises(CorpusError, match=r"a\.txt could not be read as \.txt .*NUL"):
            documents(tmp_path / "a.txt", split_rule=rule)


@pytest.mark.parametrize("ending", [".jsonl.gz", ".txt.xz", ".json.bz2", ".csv.zst", ".parquet",
                                    ".arrow", ".txt.gz"])  # fmt: skip
def test_a_damaged_file_is_named(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(b"\x1f\x8b\x08 this is none")
    with pytest.raises(CorpusError, match=rf"a{ending} could not be read as {ending} \(.*copy it"):
        documents(path)


def every_cut(path: pathlib.Path, whole: bytes, step: int = 1) -> None:
    """Cut anywhere, a file is refused by name: none of its beginnings is a smaller data set."""
    for size in range(1, len(whole), step):
        path.write_bytes(whole[:size])
        with pytest.raises(CorpusError, match=rf"{path.name} could not be read as .*copy it anew"):
            documents(path)


PACKED = [packing for packing in PACKERS if packing]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".csv"])
def test_a_truncated_archive_is_named(tmp_path, ending, packing):
    head = "text\n" if ending == ".csv" else ""
    small = PACKERS[packing]((head + json.dumps("one") + "\n").encode())
    every_cut(tmp_path / f"a{ending}{packing}", small)
    (tmp_path / f"a{ending}{packing}").write_bytes(b"")  # no program makes such a file
    with pytest.raises(CorpusError, match="could not be read as"):
        documents(tmp_path / f"a{ending}{packing}")
    large = PACKERS[packing](
        (head + "\n".join(json.dumps(f"{i * i % 977} {i}") for i in range(60_000))).encode()
    )
    assert len(large) > 50_000
    every_cut(tmp_path / f"a{ending}{packing}", large, 9973)


@pytest.mark.parametrize("packing", PACKED)
def test_several_streams_in_a_file_are_read_and_none_is_lost(tmp_path, packing):
    path, pack = tmp_path / f"a.txt{packing}", PACKERS[packing]
    second = pack(b"b" * 9000)
    for between in (b"", pack(b""), bytes(8)):
        path.write_bytes(pack(b"a") + between + second + second)
        assert documents(path) == ["a" + "b" * 18_000]
    path.write_bytes(pack(b"a") + bytes(12))  # as on a tape
    assert documents(path) == ["a"]
    broken = bytes([second[0] ^ 1]) + second[1:]
    for lost in (broken, second[:-1], second[:2], b"more", b"\xff" * 40):
        path.write_bytes(pack(b"a") + lost)
        with pytest.raises(CorpusError, match=rf"a\.txt{packing} could not be read"):
            documents(path)


def test_zstd_frames_that_hold_no_text_are_passed_over(tmp_path):
    """``pzstd`` writes one before each of its frames."""
    aside = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"size"
    frames = [aside + PACKERS[".zst"](text.encode()) for text in ("a\n\n", "b" * 9000)]
    (tmp_path / "a.txt.zst").write_bytes(b"".join(frames))
    assert documents(tmp_path / "a.txt.zst") == ["a", "b" * 9000]


@pytest.mark.parametrize("kind", ["stream", "file", "parquet"])
def test_a_truncated_columnar_file_is_named(tmp_path, kind):
    """Also where an Arrow stream is cut between two batches, which its reader takes for the end."""
    table = pyarrow.table({"text": [f"t{i}" for i in range(9)]})
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    else:
        new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
        with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    assert documents(path) == table["text"].to_pylist()
    every_cut(path, path.read_bytes())


def test_an_existing_file_of_another_kind_is_not_said_to_be_missing(tmp_path):
    for name, said in (("notes.rst", r"\.rst"), ("notes", "no ending"), ("a.parquet.gz", "parq")):
        (tmp_path / name).write_text("one\n\ntwo")
        with pytest.raises(CorpusError, match=rf"{name} is not of a kind that is read \(.*{said}"):
            load_corpus(str(tmp_path / name))


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(PLAIN[".txt"])
    monkeypatch.chdir(tmp_path)
    for name in ("", "  "):
        with pytest.raises(CorpusError, match="--corpus is empty: use"):
            load_corpus(name)
    assert load_corpus(".").digests == EXPECTED


def test_a_pipe_is_no_corpus():
    with pytest.raises(CorpusError, match="/dev/null is neither a file nor a folder"):
        load_corpus("/dev/null")


@pytest.mark.parametrize(("rule", "expected"), [
    ("blank_lines", ["a\nb", "c", "\nd\n"]),
    ("line", ["a", "b", "", "c", " ", "", "d"]),
    ("file", ["a\nb\n\nc\n \n\nd\n"]),
])  # fmt: skip
def test_split_rules(tmp_path, rule, expected):
    (tmp_path / "a.txt").write_text("a\nb\n\nc\n \n\nd\n")
    assert documents(tmp_path / "a.txt", split_rule=rule) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_pieces_part_where_the_whole_text_does(size):
    text = "a\n\nb\n \t\n\n\nc\n \nd\n"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(_paragraphs(pieces)) == re.split(r"\n[ \t]*\n", text)
    assert _PIECE > 1000


def test_nulls_are_blank_and_other_types_are_refused_by_name(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines([None, *TEXTS, None]) + '\n{"id": 1}')
    assert load_corpus(str(path)).digests == EXPECTED
    wrong = {
        "a list": ["a"], "a mapping": {"a": "b"}, "a number": 3, "true or false": True,
    }  # fmt: skip
    for kind, value in wrong.items():
        path.write_text(json_lines(["fine", value]))
        with pytest.raises(CorpusError, match=rf"a\.jsonl, line 2: column 'text' holds {kind}, no"):
            documents(path)
    data = datasets.Dataset.from_dict({"text": [b"bytes"]})
    data.to_parquet(str(tmp_path / "b.parquet"))
    with pytest.raises(CorpusError, match=r"b\.parquet, row 1: .* a value of type bytes, not text"):
        documents(tmp_path / "b.parquet")
    path.write_text("[1]")
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 1 is a list: expected a text or an obj"):
        documents(path)


def test_rows_may_be_texts_and_lines_in_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(TEXTS))
    assert documents(path) == TEXTS
    path.write_text(json_lines())
    assert documents(path) == TEXTS
    path.write_text('{"text": "one"}')
    assert documents(path) == ["one"]
    path.write_text('[{"text": "one"')
    with pytest.raises(CorpusError, match=r"a\.json could not be read as \.json \(it is not JSON"):
        documents(path)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_the_column_is_named(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    data = datasets.Dataset.from_dict({"text": ["no"], "body": ["yes"]})
    write = {".jsonl": data.to_json, ".csv": data.to_csv, ".parquet": data.to_parquet}[ending]
    write(str(path))
    assert documents(path, column="body") == ["yes"]
    with pytest.raises(
        CorpusError, match=r"no column 'prose' \(it has: text, body\): name the one"
    ):
        documents(path, column="prose")
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(CorpusError, match="text without columns, and --text-column is body"):
        documents(tmp_path / "t.txt", column="body")


def test_a_long_cell_of_a_table_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 400_000)
    assert documents(tmp_path / "a.csv") == ["x" * 400_000]


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_chats_are_made_text_only_where_they_are_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(CorpusError, match=r"no column 'text' or 'content' \(it has: messages\)"):
        documents(tmp_path / "a.jsonl")
    with pytest.raises(CorpusError, match=r"holds chats .*this stage has no model"):
        documents(tmp_path / "a.jsonl", column="messages")

    def flatten(messages):
        return "|".join(f"{m['role']}:{m['content']}" for m in messages)

    found = documents(tmp_path / "a.jsonl", column="messages", flatten=flatten)
    assert found == ["user:hi|assistant:ho"]
    assert isinstance(found[0], ChatText)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": CHAT}))
    with pytest.raises(CorpusError, match=r"--text-column text has the model's chat template"):
        documents(tmp_path / "b.jsonl", flatten=flatten)


@pytest.mark.parametrize(
    ("ending", "row"),
    [
        (".jsonl", '{"text": "a \\ud800 b"}'),
        (".jsonl", '"\\udc00"'),
        (".json", '[{"text": "x"}, {"text": "a \\ud800 b"}]'),
    ],
)
def test_half_a_surrogate_pair_is_named_with_its_row(tmp_path, ending, row):
    path = tmp_path / f"t{ending}"
    path.write_text(row)
    with pytest.raises(CorpusError, match=r"t\.jsonl?, (line 1|row 2): character \d is .*ud?[89c]"):
        documents(path)
    path.write_text('{"text": "a \\ud83d\\ude00 b"}')
    assert documents(path) == ["a \U0001f600 b"], "a whole pair is a character"


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_number_of_thousands_of_digits_is_one_line(tmp_path, ending):
    path = tmp_path / f"t{ending}"
    path.write_text('{"id": ' + "7" * 5000 + ', "text": "a"}')
    with pytest.raises(CorpusError, match=r"t\.jsonl? could not be read as \.jsonl? \(.*not JSON"):
        documents(path)


def test_rows_of_json_may_name_their_text_differently(tmp_path):
    path = tmp_path / "t.jsonl"
    rows = [{"content": "a"}, {"text": "b"}, {"other": 1}, {"text": "c", "content": "d"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert documents(path) == ["a", "b", "", "c"]
    assert documents(path, column="content") == ["a", "", "", "d"]


@pytest.mark.parametrize("ending", [".arrow", ".parquet"])
def test_bytes_that_are_no_utf8_in_a_column_of_text_are_named(tmp_path, ending):
    path = tmp_path / f"t{ending}"
    good, bad = pyarrow.array(["a", "b"]), pyarrow.array([b"a", b"\xff\xfe"]).cast(
        pyarrow.string(), safe=False
    )  # fmt: skip
    for column in (good, bad):
        table = pyarrow.table({"text": column})
        if ending == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(
                file, table.schema
            ) as writer:  # fmt: skip
                writer.write_table(table)
        if column is good:
            assert documents(path) == ["a", "b"]
    with pytest.raises(CorpusError, match=r"a text after row \d is not UTF-8"):
        documents(path)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ["[]", "{}", "null", "7"])
def test_a_saved_data_set_whose_papers_are_wrong_is_one_line(tmp_path, name, content):
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / name).write_text(content)
    try:
        assert documents(tmp_path / "set") == TEXTS, "what is not needed may be empty"
    except CorpusError as error:
        assert "could not be read as a data set saved by save_to_disk" in str(error)  # noqa: PT017


def test_a_saved_data_set_is_found_by_its_path_whatever_that_holds(tmp_path):
    folder = tmp_path / "a::b" / "c"
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "set")
    folder.parent.mkdir()
    (tmp_path / "set").rename(folder)
    assert documents(folder) == TEXTS


def test_a_snapshot_in_the_hubs_cache_is_a_folder_of_its_files(tmp_path):
    """Made by the layout of huggingface_hub: every file is a link to ``blobs``."""
    repository = tmp_path / "datasets--own--notes"
    snapshot = repository / "snapshots" / "0123abc" / "data"
    for place in (snapshot, repository / "blobs", repository / "refs"):
        place.mkdir(parents=True)
    (repository / "blobs" / "f00").write_text(json_lines())
    (snapshot / "part.jsonl").symlink_to("../../../blobs/f00")
    (tmp_path / "secret.jsonl").write_text(json_lines(["secret"]))
    (snapshot / "out.jsonl").symlink_to(tmp_path / "secret.jsonl")
    for folder in (snapshot, snapshot.parent):
        assert documents(folder) == TEXTS


def test_a_long_text_without_blank_lines_is_read_once(tmp_path):
    """Counted, not timed: what is split by the pattern is no more than the text and its ends."""
    pieces = [f"line {i} " + "x" * 500 + "\n" for i in range(2000)]
    looked = []

    class Counted:
        def split(self, text):
            looked.append(len(text))
            return BLANK.split(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("healing.data.readers._BLANK", Counted())
        assert list(_paragraphs(pieces)) == ["".join(pieces)]
    assert sum(looked) < 1.1 * sum(map(len, pieces))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_wherever_pieces_end_paragraphs_are_those_of_the_whole(size):
    draws = random.Random(0)
    for _ in range(300):
        text = "".join(draws.choices("ab\n\n \t", k=draws.randrange(40)))
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        expected = BLANK.split(text)
        assert list(_paragraphs(pieces)) == (expected if expected[-1] else expected[:-1]), text


@pytest.mark.parametrize("ending", [".csv", ".tsv"])
def test_a_quote_that_is_never_closed_is_no_text(tmp_path, ending):
    rows = ["text", *(f'"note {i}"' for i in range(50))]
    path = tmp_path / f"t{ending}"
    path.write_text("\n".join(rows))
    assert len(documents(path)) == 50
    rows[20] = rows[20].removesuffix('"')
    path.write_text("\n".join(rows))
    with pytest.raises(CorpusError, match=r"could not be read as \.[ct]sv"):
        documents(path)
    rows[20] = 'say "hi" to them'  # quotes inside of a cell without any around it
    path.write_text("\n".join(rows))
    assert documents(path)[19] == 'say "hi" to them'
