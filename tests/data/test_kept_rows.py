"""Texts of the Hub's data sets are streamed once per machine: counted by a server of our own, whose
clients are real processes.
"""

from __future__ import annotations

import contextvars
import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import filelock
import pytest

from healing.data import kept_rows
from healing.data.columns import Table, texts_of
from healing.data.kept_rows import ENDING, Row, RowCache, Wanted, row_cache
from healing.data.splits import split_documents
from healing.progress import Stopped, during, listening
from tests.conftest import ROOT
from tests.hub_server import Hub, Repository, commit_of
from tests.models.test_hub import environment, shard

NAME = "own/texts"
CLIENT = """
import json, sys
from healing.data.corpora import load_corpus
from healing.errors import HealingError

try:
    print(json.dumps(load_corpus(*json.loads(sys.argv[1])).digests))
except HealingError as error:
    print(json.dumps({"error": str(error)}))
"""


def repository(kind: str, count: int = 300) -> Repository:
    return Repository({"main": {"train/0.jsonl.zst": shard(kind, count, 0)}})


def digests_of(kind: str, count: int = 300) -> dict[str, str]:
    """What a corpus of these texts has, made without the Hub, its files or its client."""
    draws = random.Random(0)
    texts = [f"{kind}{i} {draws.randbytes(200).hex()}" for i in range(count)]
    return split_documents("x", texts).digests


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub({f"datasets/{NAME}": repository("old")}) as server:
        yield server


def started(hub: Hub | str, home: pathlib.Path, *arguments: object, **more: str):
    return subprocess.Popen(
        [sys.executable, "-c", CLIENT, json.dumps(arguments or (NAME,))],
        cwd=ROOT, env=environment(hub, home, **more), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[dict[str, str], list[str]]:
    """Digests by split or an error, and the warnings."""
    out, warned = process.communicate(timeout=100)
    assert process.returncode == 0, warned
    return json.loads(out), [line for line in warned.splitlines() if "HF_TOKEN" not in line]


def loaded(
    hub: Hub | str, home: pathlib.Path, *arguments: object, **more: str
) -> tuple[dict[str, str], list[str]]:
    return ended(started(hub, home, *arguments, **more))


def kept_files(home: pathlib.Path) -> list[pathlib.Path]:
    return sorted((home / ".cache" / "llm-healing" / "texts").glob(f"*{ENDING}"))


@pytest.mark.slow
def test_a_second_process_downloads_nothing_and_an_offline_one_asks_nothing(hub, tmp_path):
    first = loaded(hub, tmp_path)
    assert first == (digests_of("old"), [])
    commit = commit_of(hub.repositories[f"datasets/{NAME}"].revisions["main"])
    # The stream is pinned: whatever names a file or a revision names the commit.
    named = [r.path for r in hub.requests if "/resolve/" in r.path or "/revision/" in r.path]
    assert named
    assert all(f"/{commit}" in path for path in named)
    assert hub.sent("0.jsonl.zst") > 0
    hub.requests.clear()
    assert loaded(hub, tmp_path) == first
    assert [r.path for r in hub.requests] == [f"/api/datasets/{NAME}?expand=sha"]
    hub.requests.clear()
    assert loaded(hub, tmp_path, HF_HUB_OFFLINE="1") == first
    assert not hub.requests
    digests, warned = loaded("http://127.0.0.1:9", tmp_path)
    assert digests == first[0]
    assert len(warned) == 1
    assert "the Hub cannot be asked for dataset 'own/texts'" in warned[0]
    assert f"of commit {commit}" in warned[0]
    # Another question has another answer, which is not here.
    refused, _ = loaded(hub, tmp_path, NAME, 200, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids the network, and no text of it was kept" in refused["error"]
    fewer, _ = loaded(hub, tmp_path, NAME, 200)
    assert fewer == digests_of("old", 200)
    assert len(kept_files(tmp_path)) == 2
    # What the Hub does not give is not taken from the disk.
    del hub.repositories[f"datasets/{NAME}"]
    gone, _ = loaded(hub, tmp_path)
    assert "no such dataset that you may read" in gone["error"]


@pytest.mark.slow
def test_two_processes_at_once_download_once(hub, tmp_path):
    alone, _ = loaded(hub, tmp_path / "alone")
    sent = hub.sent("0.jsonl.zst")
    hub.requests.clear()
    both = [started(hub, tmp_path / "both") for _ in range(2)]
    assert [ended(process) for process in both] == [(alone, [])] * 2
    assert hub.sent("0.jsonl.zst") == sent
    assert len([r for r in hub.requests if r.path == f"/api/datasets/{NAME}?expand=sha"]) == 2


@pytest.mark.slow
def test_a_flipped_bit_and_a_moved_branch_are_fetched_again(hub, tmp_path):
    first, _ = loaded(hub, tmp_path)
    (path,) = kept_files(tmp_path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    refused, warned = loaded(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "no text of it was kept" in refused["error"]
    assert "is damaged" in warned[0]
    hub.requests.clear()
    again, warned = loaded(hub, tmp_path)
    assert again == first
    assert [f"{path} is damaged" in line for line in warned] == [True]
    assert hub.sent("0.jsonl.zst") > 0
    assert path.read_bytes() == whole
    hub.repositories[f"datasets/{NAME}"] = repository("new")
    moved, warned = loaded(hub, tmp_path)
    assert (moved, warned) == (digests_of("new"), [])
    assert len(kept_files(tmp_path)) == 2
    assert loaded(hub, tmp_path, HF_HUB_OFFLINE="1")[0] == moved  # the newest


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_costs_a_warning(hub, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    more = (NAME, 20_000, "", "blank_lines", None)
    found, warned = loaded(hub, tmp_path, *more, str(blocked))
    assert found == digests_of("old")
    assert len(warned) == 1
    assert f"text from the Hub cannot be kept in {blocked}/texts" in warned[0]
    assert blocked.read_text() == "not a folder"
    assert loaded(hub, tmp_path, *more, "") == (found, [])  # nothing is to be kept
    assert not kept_files(tmp_path)


@pytest.mark.slow
def test_a_hub_that_is_busy_is_asked_again_and_then_done_without(hub, tmp_path):
    busy = [(429, b"slow down"), (502, b"<html>bad gateway</html>"), (503, b"")]
    hub.instead = list(busy)
    found, retries = loaded(hub, tmp_path)
    assert found == digests_of("old")
    assert retries == []
    assert len([r for r in hub.requests if r.path.startswith(f"/api/datasets/{NAME}?")]) == 4
    hub.repositories[f"datasets/{NAME}"] = repository("new")
    for answer in (busy[0], (407, b"log in to the proxy"), (200, b"<html>log in</html>")):
        hub.instead = [answer] * 4
        found, warned = loaded(hub, tmp_path)
        assert found == digests_of("old")
        (warning,) = warned
        assert "the Hub cannot be asked for dataset 'own/texts'" in warning
        assert "its text is the one used last, of commit" in warning
    hub.instead = [(403, b"no")]
    refused, _ = loaded(hub, tmp_path)
    assert "403" in refused["error"]


@pytest.mark.slow
def test_a_login_that_no_request_can_hold_is_not_printed_and_no_outage(hub, tmp_path):
    assert loaded(hub, tmp_path)[1] == []
    refused, warned = loaded(hub, tmp_path, HF_TOKEN="hf_SEC\x0bRET")
    said = f"{refused} {warned}"
    assert "could not be loaded from the Hub (Illegal header value" in refused["error"]
    assert ("SEC" in said, "RET" in said) == (False, False)


def test_a_pinned_data_set_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(kept_rows, "_PINNED", {})
    monkeypatch.setattr(kept_rows, "_asked", pytest.fail)
    kept_rows.pin("own/texts", COMMIT)
    kept_rows.pin("own/texts", "1" * 40)  # too late
    assert kept_rows.commit_of("own/texts") == COMMIT


WANTED = Wanted(NAME, "", "", 100)
ROWS = [
    {"text": "plain", "meta": 1},
    {"text": "two\nlines\u2028 and \x00\r"},
    {"text": None},
    {"text": "é語🙂"},
]
COMMIT = "0" * 40


class Stream:
    """Rows, and how often they were asked for."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows, self.times = rows, 0

    def __call__(self) -> Iterator[Row]:
        self.times += 1
        yield from self.rows


def plain(rows: object) -> list[str]:
    return list(texts_of([Table("x", "row", enumerate(rows, 1))]))  # type: ignore[arg-type]


@pytest.fixture
def cache(tmp_path) -> RowCache:
    return RowCache(tmp_path / "made" / "later")


def test_the_texts_are_the_same_and_only_their_column_is_kept(cache):
    stream = Stream(ROWS)
    expected = [row["text"] or "" for row in ROWS]
    for _ in range(2):
        assert cache.texts(WANTED, COMMIT, stream, plain) == expected
    assert stream.times == 1
    assert cache.newest(WANTED) == (COMMIT, [{"text": row["text"]} for row in ROWS])


def test_what_decides_the_rows_decides_the_file(cache):
    stream = Stream(ROWS)
    others = [
        Wanted("own/other", "", "", 100),
        Wanted(NAME, "part", "", 100),
        Wanted(NAME, "", "text", 100),
        Wanted(NAME, "", "", 99),
    ]
    for wanted in (WANTED, *others):
        cache.texts(wanted, COMMIT, stream, plain)
    cache.texts(WANTED, "1" * 40, stream, plain)
    assert stream.times == 6
    assert len(list(cache.folder.glob(f"*{ENDING}"))) == 6


@pytest.mark.parametrize("what", ["datasets", "format"])
def test_what_reads_the_rows_decides_the_file_too(cache, monkeypatch, what):
    stream = Stream(ROWS)
    cache.texts(WANTED, COMMIT, stream, plain)
    if what == "datasets":
        monkeypatch.setattr("importlib.metadata.version", lambda name: f"{name} 99")
    else:
        monkeypatch.setattr(kept_rows, "FORMAT", "rows-99")
    assert cache.newest(WANTED) is None
    cache.texts(WANTED, COMMIT, stream, plain)
    assert stream.times == 2


def test_who_finds_a_file_waits_for_nobody(cache):
    expected = cache.texts(WANTED, COMMIT, Stream(ROWS), plain)
    (path,) = cache.folder.glob(f"*{ENDING}")
    found: list[list[str]] = []
    with filelock.FileLock(path.with_name(f".{path.name}.lock"), thread_local=False):
        reading = threading.Thread(
            target=lambda: found.append(cache.texts(WANTED, COMMIT, pytest.fail, plain)),
            daemon=True,
        )
        reading.start()
        reading.join(30)
    assert found == [expected]


def test_what_was_used_last_goes_last(cache):
    for number, seconds in enumerate((1000, 2000)):
        cache.texts(WANTED, str(number) * 40, Stream(ROWS), plain)
        (path,) = cache.folder.glob(f"*{str(number) * 40}{ENDING}")
        os.utime(path, (seconds, seconds))
    assert (cache.newest(WANTED) or ("",))[0] == "1" * 40
    cache.texts(WANTED, "0" * 40, pytest.fail, plain)
    assert (cache.newest(WANTED) or ("",))[0] == "0" * 40


def test_a_folder_without_locks_keeps_nonetheless(cache, caplog, monkeypatch):
    def none(*_, **__):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    stream = Stream(ROWS)
    first, again = (cache.texts(WANTED, COMMIT, stream, plain) for _ in range(2))
    assert (first, stream.times) == (again, 1)
    (record,) = caplog.records
    assert "cannot be locked ([Errno 37] No locks available)" in record.message


def test_a_file_that_may_not_be_removed_stays_and_the_new_one_is_kept(cache, monkeypatch):
    cache.texts(WANTED, COMMIT, Stream(ROWS), plain)
    (path,) = cache.folder.glob(f"*{ENDING}")
    unlink = pathlib.Path.unlink

    def refusing(self, missing_ok=False):
        if self == path:
            raise PermissionError(1, "Operation not permitted")
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(pathlib.Path, "unlink", refusing)
    full = RowCache(cache.folder, most_bytes=path.stat().st_size + 5)
    stream = Stream(ROWS)
    for _ in range(2):
        full.texts(WANTED, "1" * 40, stream, plain)
    assert stream.times == 1
    assert path.exists()


def test_a_damaged_file_does_not_count_beside_the_one_that_replaces_it(cache, caplog):
    for number in range(2):
        cache.texts(WANTED, str(number) * 40, Stream(ROWS), plain)
    first, second = sorted(cache.folder.glob(f"*{ENDING}"))
    size = first.stat().st_size + second.stat().st_size
    second.write_bytes(second.read_bytes()[:-1])
    RowCache(cache.folder, most_bytes=size + 5).texts(WANTED, "1" * 40, Stream(ROWS), plain)
    assert first.exists()


def test_a_chat_that_is_too_deep_for_json_is_read_and_not_kept(cache, caplog):
    chat: list[object] = []
    for _ in range(100_000):
        chat = [chat]
    wanted, stream = Wanted(NAME, "", "chat", 100), Stream([{"chat": chat}])
    assert cache.texts(wanted, COMMIT, stream, lambda rows: [str(len(list(rows)))]) == ["1"]
    assert "cannot be kept" in caplog.text


def test_names_stay_in_the_folder(tmp_path):
    row_cache(str(tmp_path / "a")).texts(
        Wanted("../../x/y", "../z", "", 1), COMMIT, Stream(ROWS[:1]), plain
    )
    assert {p.relative_to(tmp_path).parts[:2] for p in tmp_path.rglob("*") if p.is_file()} == {
        ("a", "texts")
    }


@pytest.mark.parametrize("at", [0.0, 0.1, 0.5, 0.99])
def test_no_changed_bit_is_believed(cache, caplog, at):
    stream = Stream([{"text": hashlib.sha256(bytes([i])).hexdigest()} for i in range(100)])
    expected = cache.texts(WANTED, COMMIT, stream, plain)
    (path,) = cache.folder.glob(f"*{ENDING}")
    whole = bytearray(path.read_bytes())
    whole[int(at * len(whole))] ^= 1
    path.write_bytes(whole)
    assert cache.texts(WANTED, COMMIT, stream, plain) == expected
    assert stream.times == 2
    assert [r.message.startswith(f"{path} is damaged") for r in caplog.records] == [True]


@pytest.mark.parametrize("keep", [0, 4, -1])
def test_nor_is_a_file_that_was_cut(cache, caplog, keep):
    stream = Stream(ROWS)
    expected = cache.texts(WANTED, COMMIT, stream, plain)
    (path,) = cache.folder.glob(f"*{ENDING}")
    path.write_bytes(path.read_bytes()[:keep])
    assert cache.texts(WANTED, COMMIT, stream, plain) == expected
    assert stream.times == 2
    assert "is damaged" in caplog.text


def test_nor_is_another_file_under_its_name(cache, caplog):
    stream = Stream(ROWS)
    cache.texts(WANTED, COMMIT, stream, plain)
    (path,) = cache.folder.glob(f"*{ENDING}")
    path.rename(path.with_name(path.name.replace(COMMIT, "1" * 40)))
    cache.texts(WANTED, "1" * 40, stream, plain)
    assert stream.times == 2
    assert "it holds other rows than its name says" in caplog.text


CHAT = [{"role": "user", "content": "hello", "more": {"n": 1, "x": [0.5, None]}}]


def of_chats(rows: object) -> list[str]:
    tables = [Table("x", "row", enumerate(rows, 1))]  # type: ignore[arg-type]
    return list(texts_of(tables, "chat", lambda chat: json.dumps(chat)))


def test_chats_are_kept_as_they_are_and_not_as_one_model_writes_them(cache):
    stream, wanted = Stream([{"chat": CHAT, "text": "x"}]), Wanted(NAME, "", "chat", 100)
    first = cache.texts(wanted, COMMIT, stream, of_chats)
    again = cache.texts(wanted, COMMIT, stream, of_chats)
    assert stream.times == 1
    assert [json.loads(text) for text in again] == [CHAT]
    assert [type(text) for text in again] == [type(text) for text in first]


@pytest.mark.parametrize("value", [b"bytes", float("nan"), (1, 2), {1: 2}])
def test_a_chat_that_json_does_not_give_back_is_not_kept(cache, caplog, value):
    chat = [{"role": "user", "content": "hello", "more": value}]
    wanted, stream = Wanted(NAME, "", "chat", 100), Stream([{"chat": chat}])
    for _ in range(2):
        cache.texts(wanted, COMMIT, stream, lambda rows: [str(list(rows))])
    assert stream.times == 2
    assert caplog.text.count("cannot be kept") == 2
    assert not list(cache.folder.glob(f"*{ENDING}"))


def test_a_stream_that_fails_leaves_nothing_and_lets_the_next_one_try(cache):
    def broken() -> Iterator[Row]:
        yield ROWS[0]
        raise ConnectionError("broken off")

    with pytest.raises(ConnectionError):
        cache.texts(WANTED, COMMIT, broken, plain)
    assert not [p for p in cache.folder.iterdir() if not p.name.endswith(".lock")]
    assert len(cache.texts(WANTED, COMMIT, Stream(ROWS), plain)) == len(ROWS)


def test_a_full_disk_costs_a_warning(cache, caplog, monkeypatch):
    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("healing.data.kept_rows._write", full)
    assert len(cache.texts(WANTED, COMMIT, Stream(ROWS), plain)) == len(ROWS)
    assert len(caplog.records) == 1
    assert "No space left on device" in caplog.text
    assert not [p for p in cache.folder.iterdir() if not p.name.endswith(".lock")]


def test_what_was_fetched_first_goes_first_and_what_is_too_large_is_not_kept(cache, caplog):
    for number in range(2):
        cache.texts(WANTED, str(number) * 40, Stream(ROWS), plain)
    size = max(p.stat().st_size for p in cache.folder.glob(f"*{ENDING}"))
    small = RowCache(cache.folder, most_bytes=2 * size + 5)
    small.texts(WANTED, "2" * 40, Stream(ROWS), plain)
    commits = {p.name.removesuffix(ENDING)[-1] for p in cache.folder.glob(f"*{ENDING}")}
    assert commits == {"1", "2"}
    assert not caplog.records
    tiny = RowCache(cache.folder, most_bytes=10)
    tiny.texts(WANTED, "3" * 40, Stream(ROWS), plain)
    assert "of 10 at most" in caplog.text
    assert len(list(cache.folder.glob(f"*{ENDING}"))) == 2


def lock_of(cache: RowCache) -> filelock.FileLock:
    cache.folder.mkdir(parents=True)
    return filelock.FileLock(cache.folder / f".{WANTED.name}-{COMMIT}{ENDING}.lock")


def test_who_waits_longer_than_two_seconds_says_so_and_can_be_stopped(cache):
    lock, told = lock_of(cache), []

    def hold() -> None:
        with lock:
            held.set()
            time.sleep(4)

    held, thread = threading.Event(), threading.Thread(target=hold)
    thread.start()
    held.wait()
    with listening(lambda name, *_: told.append(name)), during("reading text"):
        cache.texts(WANTED, COMMIT, Stream(ROWS), plain)
    thread.join()
    waiting = "waiting for another process that fetches the same text"
    assert told[0] == "reading text"
    assert waiting in told
    assert told[told.index(waiting) :].count("reading text") == 1  # and then it goes on

    def stop(name: str, *_: object) -> None:
        if name.startswith("waiting"):
            raise Stopped

    (path,) = cache.folder.glob(f"*{ENDING}")
    path.unlink()
    with lock, listening(stop), pytest.raises(Stopped):
        texts_in_a_thread(cache)


def texts_in_a_thread(cache: RowCache) -> None:
    """The same thread may not ask for a lock twice; another stands for another process."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            cache.texts(WANTED, COMMIT, Stream(ROWS), plain)
        except Stopped as error:
            errors.append(error)

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,))
    thread.start()
    thread.join()
    raise errors[0]
