"""Models and text from the Hugging Face Hub, against a server of our own, in real processes.

HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported, so every client is a process of
its own; each does several checks, since its imports take seconds.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import random
import subprocess
import sys
from collections.abc import Iterator

import mlflow
import pytest
import torch
import zstandard
from huggingface_hub.errors import XetDownloadError
from safetensors.torch import load, load_file, save

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.presets import PYTHIA_STEPS, source_of
from healing.config.resolve import resolve_from_presets
from healing.data.hub import _fetch
from healing.errors import ConfigError, ModelError
from healing.models.checkpoints import CHECKPOINT_NAME, HEALED_NAME, read_checkpoint
from healing.models.loading import load_model
from healing.models.model_files import EMBEDDED_DIR
from healing.tracking.page_text import plain_tags
from tests.conftest import ROOT
from tests.hub_server import Hub, Repository, commit_of

pytestmark = pytest.mark.slow

PYTHIA, DEDUPED = "models/EleutherAI/pythia-70m", "models/EleutherAI/pythia-70m-deduped"
PILE = "datasets/monology/pile-uncopyrighted"

PREAMBLE = """
import json, sys, time
import huggingface_hub.constants, huggingface_hub.utils._http
{early}
from healing.data.corpora import load_corpus
from healing.errors import HealingError
from healing.models.loading import load_model

def attempt(function):
    begin = time.monotonic()
    try:
        found = function()
    except HealingError as error:
        found = {{"error": " ".join(str(error).split()), "lines": len(str(error).splitlines())}}
    print(json.dumps(found | {{"seconds": time.monotonic() - begin}}), flush=True)

def model(name="70m", **changes):
    loaded = load_model(name, **changes)
    return {{"name": loaded.name, "commit": loaded.commit, "digest": loaded.digest,
            "source": loaded.source, "dtype": str(next(loaded.model.parameters()).dtype)}}

def monkeypatched(module, name, value, function, *arguments):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        return function(*arguments)
    finally:
        setattr(module, name, before)

def corpus(name="pile", count=300):
    documents = load_corpus(name, count).documents
    return {{"texts": sorted(text.split()[0] for part in documents.values() for text in part)}}
"""
NO_WAITING = """
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 65_536
time.sleep = lambda seconds: None
"""


def files_of(scale: float = 1.0, *, pickled: bool = False) -> dict[str, bytes]:
    """A tiny model that pretends to be a Pythia: nano, its weights multiplied, in fp16."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    files = {name: (EMBEDDED_DIR / "nano" / name).read_bytes() for name in names}
    state = load_file(EMBEDDED_DIR / "nano" / "model.safetensors")
    state = {k: (v * scale).to(torch.float16) for k, v in state.items()}
    if pickled:
        return files | {"pytorch_model.bin": pickled_bytes(state)}
    return files | {"model.safetensors": save(state, {"format": "pt"})}


def pickled_bytes(state: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def sharded_files(*names: str) -> dict[str, bytes]:
    """The same model, its weights dealt out to files of these names, with an index."""
    files = files_of()
    state = load(files.pop("model.safetensors"))
    whole = "model.safetensors" if names[0].endswith(".safetensors") else "pytorch_model.bin"
    placed = {key: names[i % len(names)] for i, key in enumerate(sorted(state))}
    for name in names:
        part = {key: value for key, value in state.items() if placed[key] == name}
        pickled = whole.endswith(".bin")
        files[name] = pickled_bytes(part) if pickled else save(part, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    return files | {f"{whole}.index.json": json.dumps(index).encode()}


def shard(kind: str, count: int, seed: int, letters: int = 200) -> bytes:
    """Documents in the Pile's layout, incompressible, so that bytes can be counted."""
    draws = random.Random(seed)
    lines = (
        json.dumps({"text": f"{kind}{i} {draws.randbytes(letters).hex()}", "meta": {"set": "x"}})
        for i in range(count)
    )
    return zstandard.compress("\n".join(lines).encode())


@pytest.fixture(scope="module")
def pile() -> dict[str, bytes]:
    return {
        "README.md": b"---\nlicense: other\n---\n# The Pile\n",
        "train/00.jsonl.zst": shard("train", 24_000, 0, letters=1000),
        "train/01.jsonl.zst": shard("later", 300, 1),
        "val.jsonl.zst": shard("val", 300, 2),
        "test.jsonl.zst": shard("test", 300, 3),
    }


@pytest.fixture
def hub(pile) -> Iterator[Hub]:
    repositories = {
        PYTHIA: Repository({"main": files_of(), "step0": files_of(0.5, pickled=True)}),
        DEDUPED: Repository({"main": files_of(0.9), "step1000": files_of(0.8)}),
        "models/own/gated": Repository({"main": files_of()}, gated=True),
        "models/own/onnx": Repository({"main": {"config.json": b"{}", "onnx/model.onnx": b"0"}}),
        PILE: Repository({"main": pile}),
    }
    with Hub(repositories) as server:
        yield server


def environment(hub: Hub | str, home: pathlib.Path, **more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MLFLOW", "HUGGING"))}
    endpoint = hub if isinstance(hub, str) else hub.endpoint
    return {
        **kept, "HF_HOME": str(home / "hf"), "HF_ENDPOINT": endpoint, "OMP_NUM_THREADS": "1",
        "HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db",
        **more,
    }  # fmt: skip


def client(
    hub: Hub | str, home: pathlib.Path, *attempts: str, early: str = "", **more: str
) -> list[dict]:
    """What each attempt found, or its error, in one process."""
    code = PREAMBLE.format(early=early) + "\n".join(f"attempt(lambda: {a})" for a in attempts)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT, env=environment(hub, home, **more), capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_models_download_once_and_work_offline_afterwards(hub, tmp_path):
    wanted = (
        "model()",
        "model(revision='step0')",
        "model(deduped=True, revision='step1000')",
        "model(revision='step1')",
        "model('own/nothing')",
        "model('own/gated')",
        "model('own/onnx')",
        "model(revision='f' * 40)",
    )
    first = client(hub, tmp_path, *wanted)
    main, step0, deduped, missing, nothing, gated, onnx, commit = first
    repository = hub.repositories[PYTHIA].revisions
    assert main["commit"] == commit_of(repository["main"])
    assert (main["name"], main["source"]) == ("70m", "EleutherAI/pythia-70m")
    assert main["digest"] == load_model("nano").digest  # the fp16 file, in float32
    assert step0["commit"] == commit_of(repository["step0"])  # pytorch_model.bin alone
    assert (deduped["name"], deduped["source"]) == (
        "70m-deduped@step1000",
        "EleutherAI/pythia-70m-deduped",
    )
    assert len({found["digest"] for found in first[:3]}) == 3
    assert {found["dtype"] for found in first[:3]} == {"torch.float32"}
    assert "pythia-70m, revision step1: no such revision" in missing["error"]
    assert "the Hub has no such model that you may read" in nothing["error"]
    assert "own/gated, revision main: it is gated: accept its terms at" in gated["error"]
    assert "neither model.safetensors nor pytorch_model.bin" in onnx["error"]
    assert f"pythia-70m, revision {'f' * 40}: no such revision" in commit["error"]
    assert [found["lines"] for found in first[3:]] == [1] * 5
    hub.requests.clear()
    second = client(hub, tmp_path, *wanted[:3])
    assert [f["digest"] for f in second] == [f["digest"] for f in first[:3]]
    assert not hub.file_requests()
    assert len(hub.requests) == 3  # one question per revision: which commit is it now?
    hub.requests.clear()
    offline = client(hub, tmp_path, *wanted[:4], "corpus()", HF_HUB_OFFLINE="1")
    assert [f["digest"] for f in offline[:3]] == [f["digest"] for f in first[:3]]
    assert (
        "revision step1 of model EleutherAI/pythia-70m is not in the cache" in offline[3]["error"]
    )
    assert "HF_HUB_OFFLINE forbids the network" in offline[3]["error"]
    assert "HF_HUB_OFFLINE forbids the network, and no text of it was kept" in offline[4]["error"]
    assert not hub.requests


def test_whether_weights_are_here_is_found_out_without_them(hub, tmp_path):
    hub.repositories["models/own/parts"] = Repository({"main": sharded_files(*SHARDS)})
    here = "{'here': weights_are_here('own/parts')}"
    half = "huggingface_hub.hf_hub_download('own/parts', 'model-00001-of-00002.safetensors')"
    early = "from healing.models.model_files import weights_are_here"
    found = client(hub, tmp_path, here, f"[{half}] and {here}", here, "model('own/parts')", here,
                   early=early)  # fmt: skip
    assert [f.get("here") for f in found] == [False, False, False, None, True]
    before = [r.path for r in hub.requests]
    (again,) = client(hub, tmp_path, here, early=early, HF_HUB_OFFLINE="1")
    assert again["here"]
    assert [r.path for r in hub.requests] == before
    # What is said before a download: bytes of the weights alone, as the server tells them.
    parts = {k: len(v) for k, v in sharded_files(*SHARDS).items() if k.endswith(".safetensors")}
    count = "{'bytes': bytes_to_fetch('own/parts')}"
    early = "from healing.models.model_files import bytes_to_fetch, weights_are_here"
    said = client(hub, tmp_path / "said", count, f"[{half}] and {count}", early=early)
    assert [f["bytes"] for f in said] == [sum(parts.values()), parts[SHARDS[1]]]
    (none,) = client(hub, tmp_path, count, early=early)
    assert none["bytes"] == 0
    before = [r.path for r in hub.requests]
    (absent,) = client(hub, tmp_path / "empty", here, early=early)
    assert absent["here"] is False
    assert not [r for r in hub.requests[len(before) :] if r.path.endswith(".safetensors")]


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_weights_in_several_files_and_formats(hub, tmp_path):
    names = {
        "plain": SHARDS,
        "pickled": ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        "six": ("model-00001-of-000002.safetensors", "model-00002-of-000002.safetensors"),
        "odd": ("model.safetensors-00001-of-00001.safetensors",),
        "escaped": ("weights[1].safetensors",),
    }
    files = {name: sharded_files(*shards) for name, shards in names.items()}
    files["both"] = files_of() | files_of(pickled=True)
    files["mixed"] = files["plain"] | files["pickled"]
    files["holed"] = {k: v for k, v in files["plain"].items() if k != SHARDS[1]}
    files["torn"] = files["plain"] | {"model.safetensors.index.json": b'{"weight_map": 3}'}
    for name in files:
        hub.repositories[f"models/own/{name}"] = Repository({"main": files[name]})
    *found, holed, torn = client(hub, tmp_path, *(f"model('own/{name}')" for name in files))
    nano = load_model("nano").digest
    assert {f["source"]: f.get("digest") for f in found} == {
        f"own/{name}": nano for name in [*names, "both", "mixed"]
    }
    asked = {r.path.split("/resolve/")[0].strip("/"): [] for r in hub.file_requests()}
    for request in hub.file_requests():
        owner, path = request.path.strip("/").split("/resolve/")
        asked[owner].append(path.split("/", 1)[1])
    assert not [p for p in asked["own/both"] + asked["own/mixed"] if p.endswith(".bin")]
    assert f"names 1 files that are not there, first {SHARDS[1]}" in holed["error"]
    assert "model.safetensors.index.json of model own/torn" in torn["error"]
    assert "is damaged" in torn["error"]


def test_what_a_repository_holds_is_looked_at_as_a_folder_is(hub, tmp_path):
    state = load(files_of()["model.safetensors"])
    first = sorted(state)[0]
    codes = state | {first: (state[first] * 100).to(torch.int8)}
    wrapped = {f"_orig_mod.{name}": value for name, value in state.items()}
    fp8 = {name: value.to(torch.float8_e5m2) for name, value in state.items()}
    small = {k: v for k, v in files_of().items() if k != "model.safetensors"}
    repositories = {
        "codes": {"model.safetensors": save(codes, {"format": "pt"})},
        "fp8": {"pytorch_model.bin": pickled_bytes(fp8)},
        "wrapped": {"model.safetensors": save(wrapped, {"format": "pt"})},
        "cut": {"model.safetensors": files_of()["model.safetensors"][:-4]},
    }
    for name, weights in repositories.items():
        hub.repositories[f"models/own/{name}"] = Repository({"main": small | weights})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "own/codes"}')
    (adapter / "adapter_model.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    wanted = [f"model('own/{name}')" for name in repositories] + [f"model({str(adapter)!r})"]
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):  # from the network, from the cache
        coded, halved, whole, cut, base = client(hub, tmp_path, *wanted, **more)
        assert "model own/codes could not be loaded from own/codes (1 of its" in coded["error"]
        assert f"no weights at all, first {first} (int8)" in coded["error"]
        assert f"{len(state)} of its tensors are quantized" in halved["error"]
        assert "(float8_e5m2)" in halved["error"]
        assert whole["digest"] == load_model("nano").digest
        assert "its model.safetensors is damaged or cut short" in cut["error"]
        assert "its base model: model own/codes could not be loaded" in base["error"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Data processing error: CAS service error\nmore"),
        XetDownloadError("reconstruction failed"),
        ValueError("Xet headers have not been correctly set by the server."),
        OSError("broken pipe"),
    ],
)
def test_whatever_a_download_ends_with_is_one_line(monkeypatch, error):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelError, match=r"own/xet \(revision v1\).*was not completed") as caught:
        _fetch("own/xet", "v1", "0" * 40, ["*"])
    assert str(error).splitlines()[0] in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.__cause__ is error


def test_a_mistake_in_the_program_is_not_a_download_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda: None)
    with pytest.raises(TypeError):
        _fetch("own/xet", "v1", "0" * 40, ["*"])


def test_interrupted_downloads(hub, tmp_path):
    hub.breaks = {"model.safetensors": 200_000}  # of 625,136 bytes, on every connection
    hub.breaks["00.jsonl.zst"] = 1000
    hub.repositories["models/own/parts"] = Repository({"main": sharded_files(*SHARDS)})
    hub.stops = {SHARDS[1]: 200_000}  # of about 300,000, and then no more
    wanted = ("model()", "model('own/parts')", "corpus()")
    resumed, failed, text = client(hub, tmp_path / "b", *wanted, early=NO_WAITING)
    assert resumed["digest"] == load_model("nano").digest
    ranges = [r.range for r in hub.file_requests() if r.range]
    assert len(ranges) >= 2  # it went on where it had stopped
    assert "the download of model own/parts (revision main) from" in failed["error"]
    assert "was not completed" in failed["error"]
    assert "run again, complete files are kept" in failed["error"]
    assert "dataset 'monology/pile-uncopyrighted' could not be loaded" in text["error"]
    hub.breaks, hub.stops = {}, {}
    sizes = {name: len(hub.repositories["models/own/parts"].revisions["main"][name])
             for name in SHARDS}  # fmt: skip
    assert [hub.sent(name) for name in SHARDS] == [sizes[SHARDS[0]], 200_000]
    hub.requests.clear()
    offline = "monkeypatched(huggingface_hub.constants, 'HF_HUB_OFFLINE', True, model, 'own/parts')"
    refused, whole = client(hub, tmp_path / "b", offline, "model('own/parts')")
    assert "HF_HUB_OFFLINE forbids the network" in refused["error"]
    assert whole["digest"] == load_model("nano").digest
    assert [hub.sent(name) for name in SHARDS] == [0, sizes[SHARDS[1]]]  # from its beginning
    hub.silent = True
    check_nobody_waits(hub, tmp_path / "b", "timed out", HF_HUB_ETAG_TIMEOUT="1")
    check_nobody_waits("http://127.0.0.1:9", tmp_path / "b", "refused")


def check_nobody_waits(hub: Hub | str, home: pathlib.Path, why: str, **more: str) -> None:
    """A silent or absent server: seconds, the cache where it has the model, else one line."""
    wanted = ("model()", "model(revision='step0')", "corpus()", "model('own/other')")
    cached, revision, text, other = found = client(hub, home, *wanted, **more)
    assert cached["digest"] == load_model("nano").digest
    assert "revision step0 of model EleutherAI/pythia-70m is not in the cache" in revision["error"]
    assert "use --model nano or micro, which need no download" in revision["error"]
    assert all(why in f["error"] for f in (revision, text, other))
    assert max(f["seconds"] for f in found) < 6


def test_the_pile_is_streamed_and_only_its_training_part(hub, tmp_path, pile):
    small = {
        f"{name}.jsonl.zst": shard(name.replace("/", ""), 40, seed)
        for seed, name in enumerate(("train/00", "train/01", "val", "test"))
    }
    hub.repositories["datasets/own/pile"] = Repository({"main": small})
    few, whole, nothing = client(
        hub, tmp_path, "corpus()", "corpus('own/pile')", "corpus('own/nothing')"
    )
    assert few["texts"] == sorted(f"train{i}" for i in range(300))
    shard_size = len(pile["train/00.jsonl.zst"])
    # It is read in blocks of 5 MB, twice: once to find the columns.
    assert hub.sent("train/00.jsonl.zst") <= 22_000_000 < shard_size < 30_000_000
    assert not [r for r in hub.requests if "pile-uncopyrighted" in r.path and "01.jsonl" in r.path]
    assert hub.sent("val.jsonl.zst") == hub.sent("test.jsonl.zst") == 0
    assert len(whole["texts"]) == 80  # both shards of the small one, to their ends
    assert {text[:7] for text in whole["texts"]} == {"train00", "train01"}
    assert "no such dataset that you may read" in nothing["error"]
    folder = tmp_path / "local" / "train"
    folder.mkdir(parents=True)
    for name in ("train/00", "train/01"):
        (folder.parent / f"{name}.jsonl.zst").write_bytes(small[f"{name}.jsonl.zst"])
    (local,) = client(hub, tmp_path, f"corpus({str(folder)!r})", HF_HUB_OFFLINE="1")
    assert local["texts"] == whole["texts"]  # a copy needs no network


def test_a_data_set_of_several_configurations(hub, tmp_path):
    described = "configs:\n" + "".join(
        f"- config_name: {name}\n  data_files: {name}/*.jsonl.zst\n" for name in ("old", "new")
    )
    files = {f"{name}/0.jsonl.zst": shard(name, 40, 0) for name in ("old", "new")}
    files["README.md"] = f"---\n{described}---\n".encode()
    hub.repositories["datasets/own/two"] = Repository({"main": files})
    wanted = ("corpus('own/two')", "corpus('own/two:new')", "corpus('own/two:newer')")
    unnamed, named, unknown = client(hub, tmp_path, *wanted)
    assert "it has 2 configurations (old, new): name one, as own/two:old" in unnamed["error"]
    assert named["texts"] == sorted(f"new{i}" for i in range(40))
    assert "dataset 'own/two:newer' could not be loaded" in unknown["error"]
    assert "'newer' not found" in unknown["error"]
    assert (unnamed["lines"], unknown["lines"]) == (1, 1)


def run_stage(hub: Hub, home: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-m", *arguments, "--verbosity", "quiet"]
    return subprocess.run(
        command, cwd=home, env=environment(hub, home, PYTHONPATH=str(ROOT)), capture_output=True,
        text=True, timeout=100, check=False,
    )  # fmt: skip


def test_attack_and_heal_of_a_training_checkpoint_from_the_command_line(hub, tmp_path):
    shared = ("--corpus", "stdlib", "--sequence-length", "64", "--probe-tokens", "1024",
              "--batch-size", "2", "--threads", "1", "--device", "cpu")  # fmt: skip
    attacked = run_stage(
        hub, tmp_path, "entrypoints.attack", "--model", "70m", "--revision", "step1000",
        "--deduped", "--arm", "random_tokens", "--attack-steps", "2", *shared,
    )  # fmt: skip
    assert attacked.returncode == 0, attacked.stderr
    (path,) = (tmp_path / "experiments").rglob(CHECKPOINT_NAME)
    assert path.parents[1].name.startswith("70m-deduped@step1000_random_tokens_seed0_attack_")
    revisions = hub.repositories[DEDUPED].revisions
    commit = commit_of(revisions["step1000"])
    revisions["step1000"] = files_of(0.7)  # it moves; what was attacked is in the cache alone
    healed = run_stage(
        hub, tmp_path, "entrypoints.heal", "--collapsed-checkpoint", str(path),
        "--healing-steps", "2", "--save-healed", "true", *shared,
    )  # fmt: skip
    assert healed.returncode == 0, healed.stderr
    (stored,) = (tmp_path / "experiments").rglob(HEALED_NAME)
    for made in (path, stored):
        assert read_checkpoint(made).config["model_commit"] == commit
    refused = run_stage(
        hub, tmp_path, "entrypoints.heal", "--collapsed-checkpoint", str(path), "--revision",
        "step2000", *shared,
    )  # fmt: skip
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "is a checkpoint of revision step1000 of model 70m, --revision says" in refused.stderr
    tracking = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in tracking.search_experiments() if e.name != "Default"]
    runs = tracking.search_runs([experiment.experiment_id], "tags.model = '70m-deduped@step1000'")
    assert {run.data.tags["stage"] for run in runs} == {"attack", "heal"}
    for run in runs:
        stage, tags = run.data.tags["stage"], plain_tags(run.data.tags)
        assert tags["model_source"] == "EleutherAI/pythia-70m-deduped"
        assert tags["model_revision"] == commit
        assert run.data.params[f"{stage}.revision"] == "step1000"
        assert run.data.params[f"{stage}.deduped"].lower() == "true"
        assert run.data.params["model"] == "70m"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AttackConfig(model="70m", revision="step1500"),
            r"not one of Pythia's 154 training checkpoints .* the nearest is step1000$",
        ),
        (lambda: AttackConfig(model="1b", revision="step143001"), "the nearest is step143000"),
        (lambda: HealConfig(model="1b", revision="step03"), "the nearest is step"),
        (lambda: HealConfig(model="1b", revision="final"), "main or a commit \\(40 hex digits\\)$"),
        (
            lambda: AttackConfig(model="nano", revision="step1"),
            "--model nano is embedded: leave --revision out",
        ),
        (
            lambda: AttackConfig(model=str(EMBEDDED_DIR / "nano"), revision="step1"),
            "is a local folder: leave --revision out",
        ),
        (lambda: AttackConfig(model="own/model", revision="a b"), "not a branch, tag or commit"),
        (lambda: AttackConfig(model="nano", deduped=True), "leave it out with --model nano"),
        (lambda: AttackConfig(model="own/model", deduped=True), "leave it out with --model own"),
        (lambda: AttackConfig(model="./gone"), r"--model \./gone: no folder .*gone here"),
        (lambda: AttackConfig(model="giga"), "unknown model 'giga': choose one of nano, micro"),
        (lambda: AttackConfig(model="a/b/c"), "unknown model 'a/b/c'.*a Hub id"),
        (lambda: AttackConfig(model=""), "unknown model ''"),
        (lambda: resolve_from_presets(HealConfig(revision="step7")), "the nearest is step8"),
    ],
)
def test_what_can_be_refused_without_the_network(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_revisions_and_sources():
    assert len(set(PYTHIA_STEPS)) == 154
    assert (PYTHIA_STEPS[0], PYTHIA_STEPS[-1], 512 in PYTHIA_STEPS) == (0, 143_000, True)
    for revision in ("main", "step512", "step143000", "0" * 40):
        assert (
            resolve_from_presets(AttackConfig(model="2.8b", revision=revision)).revision == revision
        )
    assert resolve_from_presets(AttackConfig(model="70m")).revision == "main"
    assert resolve_from_presets(AttackConfig(model="nano")).revision == ""
    assert source_of("1.4b", True) == "EleutherAI/pythia-1.4b-deduped"
    assert source_of("own/model") == "own/model"
    assert AttackConfig(model="own/model", revision="v1.0/x").label == "own/model@v1.0/x"
