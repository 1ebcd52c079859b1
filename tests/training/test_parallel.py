"""One model over several processes: the numbers of one process, states that any number of ranks
goes on from, and processes that end together.
"""

from __future__ import annotations

import datetime
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import distributed

from healing.config.heal import HealConfig
from healing.errors import ConfigError, ParallelError
from healing.measurements.kept_measurements import forget
from healing.models.checkpoints import save_checkpoint
from healing.models.loading import load_model
from healing.models.sharing import Share
from healing.progress import Safe
from healing.randomness import named_generator
from healing.stages.cells.events import Begin
from healing.stages.cells.heal import heal_cell
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.inputs import resolve_from_model
from healing.stages.cells.state_classes import STATE_CLASSES
from healing.stages.dry_run.per_rank import part_bytes, predict_rank
from healing.stages.heal import heal
from healing.tracking.run_files import read_jsonl
from healing.tracking.snapshots import FileSnapshots, Kept
from healing.training.parallel.group import LOOPBACK, own_store, ranks_of
from healing.training.parallel.team import ranks_for

ROOT = pathlib.Path(__file__).parents[2]
# Sums of another order in float32, through a few steps: 4e-6 at most was seen. A gradient that is
# the sum over ranks instead of their mean, or one share's spectrum, is off by percents.
TOLERANCE = 1e-5
# Attention does not change with a bias of all keys: its gradient is rounding alone, which AdamW
# makes a full step.
BIASES = "query_key_value.bias"
SMALL = {"model": "nano", "sequence_length": 32, "probe_tokens": 640, "batch_size": 4,
         "healing_steps": 6, "measurement_interval": 2, "threads": 1}  # fmt: skip
# What a healing may do beside its steps. 19 probe windows: no two of four ranks' shares in common.
EVERYTHING = {
    "probe_tokens": 608, "gradient_clip": 0.5, "healing_optimizer": "sgd", "healing_lr": 0.05,
    "healing_momentum": 0.9, "healing_warmup": 0.4, "healing_decay": "cosine",
    "gradient_checkpointing": True, "measurements": "accuracy,token_loss",
}  # fmt: skip


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory) -> pathlib.Path:
    model, draws = load_model("nano").model, named_generator(0, "noise")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draws)
    path = tmp_path_factory.mktemp("collapsed") / "checkpoint_post_treatment.pt"
    save_checkpoint(path, model, 1, "nano with noise", {"model": "nano", "arm": "gaussian_noise"})
    return path


def cell_of(path: pathlib.Path, **changes) -> HealCell:
    return HealCell(resolve_from_model(HealConfig(**{**SMALL, **changes})), str(path))


def until_step(cell: HealCell, step: int):
    """A cell under way that is over with a step, and what it is to go on from."""
    forget()
    events = heal_cell(cell)
    assert isinstance(next(events), Begin)
    event = events.send(None)
    while not (isinstance(event, Safe) and event.done == step):
        event = next(events)
    return events, event


def whole(cell: HealCell, kept=None):
    """Outcome, model, and every number of a cell's records."""
    forget()
    events = heal_cell(cell)
    next(events)
    numbers, answer = {}, kept
    while True:
        try:
            event = events.send(answer)
        except StopIteration as end:
            outcome, loaded = end.value
            return outcome, loaded.model, numbers
        answer = None
        if not isinstance(event, Safe):
            numbers |= {(event.step, name): value for name, value in event.metrics.items()}


def assert_equal(found, expected) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if key[1] != "tokens_per_second":
            # A share near 0 is a small difference of large numbers: its scale is 100 %.
            least = 100 * TOLERANCE if key[1].endswith("_pct") else 0.0
            assert found[key] == pytest.approx(value, rel=TOLERANCE, abs=least, nan_ok=True), key


def assert_close(one: torch.nn.Module, other: torch.nn.Module) -> None:
    heads = one.config.num_attention_heads
    for name, tensor in one.state_dict().items():
        compared = other.state_dict()[name]
        if name.endswith(BIASES):  # of every head its queries, keys and values
            tensor, compared = (t.view(heads, 3, -1)[:, [0, 2]] for t in (tensor, compared))
        distance = torch.linalg.vector_norm(tensor - compared)
        assert distance <= TOLERANCE * torch.linalg.vector_norm(tensor), name


def test_nobody_else_reaches_where_the_ranks_meet():
    store = own_store(datetime.timedelta(seconds=10))
    listening = {
        line.split()[1].partition(":")[0]
        for table in ("tcp", "tcp6")
        for line in pathlib.Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if line.split()[1].endswith(f":{store.port:04X}") and line.split()[3] == "0A"
    }
    assert listening == {"0100007F"}, "127.0.0.1, as the kernel writes it"
    store.set("a", "b")
    client = distributed.TCPStore("127.0.0.1", store.port, is_master=False)
    assert client.get("a") == b"b"


def children() -> list[psutil.Process]:
    return [
        p for p in psutil.Process().children(recursive=True) if "parallel.follow" in p.cmdline()[-5]
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("total", [7, 8, 19])
def test_shares_are_all_rows_once_and_as_many_passes(ranks, total):
    rows = torch.arange(total)
    shares = [Share(rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat([rows[s.rows(total)] for s in shares]), rows)
    filled = [s.filled(rows) for s in shares]
    assert {len(f) for f, _ in filled} == {math.ceil(total / ranks)}
    assert torch.equal(torch.cat([f[:own] for f, own in filled]), rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ranks": 2}, "--ranks belongs to --parallel: add --parallel fsdp"),
        ({"batch_size": 4, "ranks": 3}, "a batch of 4 windows cannot be divided among 3 ranks: use "
         "--ranks 1, 2, 4, or"),
        ({"healing_method": "lora"}, "--parallel fsdp does not go with --healing-method lora"),
        ({"measurements": "cka"}, "--measurements cka needs all weights in one process"),
        ({"precision": "fp16"}, "--parallel fsdp trains in fp32 or under bf16 autocast"),
        ({"precision": "bf16", "precision_mode": "pure"}, "leave out --precision-mode pure"),
        ({"device": "cuda:1"}, "--device cuda:1 is one: say --device cuda"),
        ({"parallel": "tensor"}, "--parallel must be one of none, fsdp, ddp"),
        ({"ranks": 1025}, "--ranks must be at least 0 and at most 1024"),
    ],
)  # fmt: skip
def test_what_several_processes_cannot_do_is_refused(given, message):
    start = {} if "ranks" in given and len(given) == 1 and given["ranks"] == 2 else {
        "parallel": "fsdp"}  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        HealConfig(**{**SMALL, **start, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "--parallel fsdp on the CPU needs --ranks: say how many processes"),
        ({"ranks": 4, "probe_tokens": 64}, "2 probe windows are fewer than 4 ranks"),
    ],
)
def test_ranks_that_there_cannot_be_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        ranks_of(HealConfig(**{**SMALL, "device": "cpu", "parallel": "fsdp", **given}))


def test_a_launchers_number_of_ranks_is_taken(monkeypatch):
    launch = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    config = HealConfig(**SMALL, device="cpu", parallel="fsdp")
    assert ranks_of(config) == 2
    with pytest.raises(ConfigError, match="--ranks 4, but 2 processes were launched"):
        ranks_of(replace(config, ranks=4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "ranks", "changes"),
    [("fsdp", 2, {}), ("fsdp", 4, EVERYTHING), ("ddp", 2, EVERYTHING)],
)
def test_several_ranks_find_what_one_process_finds(collapsed, parallel, ranks, changes):
    alone, model, expected = whole(cell_of(collapsed, **changes))
    many = cell_of(collapsed, **changes, parallel=parallel, ranks=ranks)
    outcome, other, found = whole(many)
    assert len(expected) > 50
    assert_equal(found, expected)
    assert_close(model, other)
    for one, two in (
        (alone.healthy, outcome.healthy),
        (alone.records[0].measurement, outcome.records[0].measurement),
    ):
        assert two.rank_standard_error == pytest.approx(one.rank_standard_error, rel=TOLERANCE)
    assert outcome.fingerprint == alone.fingerprint
    for state, said in alone.said.by_state.items():
        assert torch.equal(said, outcome.said.by_state[state])
    assert children() == []


def listening_at(*processes: psutil.Process) -> set[str]:
    found = [c for p in processes for c in p.net_connections("inet")]
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_ranks_exchange_on_this_machine_alone(collapsed, parallel, monkeypatch):
    """Also where the machine's name has another address, as most have."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    before = dict(os.environ)
    mine = {c.laddr for c in psutil.Process().net_connections("inet")}
    events, _ = until_step(cell_of(collapsed, parallel=parallel, ranks=2), 2)
    own = {c.laddr.ip for c in psutil.Process().net_connections("inet") if c.laddr not in mine}
    followers = children()
    assert len(followers) == 1
    addresses = {ip.removeprefix("::ffff:") for ip in own | listening_at(*followers)}
    assert addresses == {"127.0.0.1"}
    # Where the machine's name has this address, the variables alone show whether it was chosen.
    for environment in (os.environ, followers[0].environ()):
        assert environment["GLOO_SOCKET_IFNAME"] == environment["NCCL_SOCKET_IFNAME"] == LOOPBACK
    events.close()
    assert dict(os.environ) == before


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(4, 2), (2, 0), (0, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(collapsed, tmp_path, first, then):
    def cell(ranks: int) -> HealCell:
        spread = {"parallel": "fsdp", "ranks": ranks} if ranks else {}
        return cell_of(collapsed, healing_decay="linear", **spread)

    events, safe = until_step(cell(first), 3)
    kept, snapshots = Kept("x", safe.state(), step=3), FileSnapshots(STATE_CLASSES)
    snapshots.save(tmp_path / "run", kept)
    alone, at_three = until_step(cell(0), 3)
    trained, same = (x["loop"]["trainer"] for x in (kept.state, at_three.state()))
    assert same["weights"].keys() == trained["weights"].keys()
    assert same["counts"] == trained["counts"]
    assert same["optimizer"]["param_groups"] == trained["optimizer"]["param_groups"]
    for number, moments in same["optimizer"]["state"].items():
        for name, value in moments.items():
            there = trained["optimizer"]["state"][number][name]
            assert (type(there), there.shape, there.dtype) == (
                type(value), value.shape, value.dtype,
            )  # fmt: skip
    events.close()
    alone.close()
    state = snapshots.load(tmp_path / "run", "x").state
    _, model, expected = whole(cell(0))
    _, other, found = whole(cell(then), state)
    assert_equal(found, {key: v for key, v in expected.items() if key[0] > 3})
    assert_close(model, other)


@pytest.mark.slow
def test_a_run_that_breaks_is_told_alike(collapsed):
    """Weights that overflow: what failed first, and that the healthy model fails as well."""
    wild = {"healing_lr": 1e25, "healing_optimizer": "sgd"}
    alone, _, _ = whole(cell_of(collapsed, **wild))
    outcome, _, _ = whole(cell_of(collapsed, **wild, parallel="fsdp", ranks=2))
    last, expected = outcome.records[-1], alone.records[-1]
    assert expected.stalled
    assert (last.stalled, last.step, last.failure) == (True, expected.step, expected.failure)
    assert outcome.healthy_replay == alone.healthy_replay


@pytest.mark.slow
def test_bytes_of_every_rank_are_those_predicted(collapsed, corpus):
    loaded = load_model("nano")
    probe_windows = corpus.windows("train", loaded.tokenizer, 32)[:8]
    from healing.measurements.probe import Probe

    for mode, parts in (("fsdp", 4), ("ddp", 1)):
        config = cell_of(collapsed, parallel=mode, ranks=4).config
        with ranks_for(config, loaded, Probe(probe_windows)) as ranks:
            ranks.trainer_of(loaded.model, config).step(probe_windows[:4])
            ranks.probe.measure(loaded.model)  # leaves nothing gathered
            counted = ranks.all_do("bytes_of_ranks", probe_windows[:4]).tolist()
        predicted = part_bytes(loaded.model.parameters(), parts)
        assert len(counted) == 4
        # Every first dimension of nano can be divided by four.
        assert counted == [[predicted, predicted, 2 * predicted]] * 4
        assert predicted == 4 * loaded.n_params // parts
    told = predict_rank(config, loaded.model.config, torch.device("cpu"))
    assert any("each of 4 ranks (ddp)" in line for line in told.plan)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_one_line(store, collapsed):
    config = cell_of(collapsed, parallel="fsdp", ranks=2, healing_steps=400).config
    events, _ = until_step(HealCell(config, str(collapsed)), 1)
    (other,) = children()
    other.kill()
    with pytest.raises(ParallelError, match="rank 1 of 2 was killed by signal 9, and the run with"):
        list(events)
    assert children() == []
    # The next run of the same process starts ranks of its own.
    (done,) = heal(
        HealConfig(**{**SMALL, "parallel": "fsdp", "ranks": 2, "healing_steps": 1},
                   collapsed_checkpoint=str(collapsed), verbosity="quiet")
    )  # fmt: skip
    assert done.records[-1].step == 1
    assert children() == []


def command(collapsed, output, *more: str, launch: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "healing_steps"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, *launch, "-m", "entrypoints.heal", *arguments, "--parallel=fsdp",
         f"--collapsed-checkpoint={collapsed}", f"--output-dir={output}", *more],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def wait_for(output: pathlib.Path, step: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        for lines in output.glob("priority5_healing/raw_data/*_run*/metrics.jsonl"):
            if any(row["step"] >= step for row in read_jsonl(lines)):
                return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise TimeoutError("no such step")


def runs() -> list:
    client = MlflowClient()
    found = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(found, order_by=["attributes.start_time ASC"])


@pytest.mark.slow
def test_sigterm_keeps_the_state_and_fewer_ranks_go_on(store, collapsed):
    output = store / "output"
    process = command(collapsed, output, "--ranks=2", "--healing-steps=2000")
    wait_for(output, 4, process)
    followers = psutil.Process(process.pid).children(recursive=True)
    assert followers
    for other in followers:
        other.send_signal(signal.SIGTERM)  # as a scheduler's, to all: rank 0's to act upon
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 143, said
    assert "Traceback" not in said
    assert psutil.wait_procs(followers, timeout=20)[1] == []
    (run,) = runs()
    assert (run.info.status, run.data.tags["parallel"]) == ("KILLED", "fsdp, 2 ranks")
    process = command(collapsed, output, "--ranks=1", "--healing-steps=2000")
    last = int(run.data.tags["stopped_at_step"])
    wait_for(output, last + 2 - last % 2, process)
    followers = psutil.Process(process.pid).children(recursive=True)
    process.kill()  # nobody is told, and nobody stays
    said = process.communicate()[0]
    assert f"going on from step {last}" in said
    assert psutil.wait_procs(followers, timeout=20)[1] == []


@pytest.mark.slow
def test_followers_end_with_a_rank_0_that_was_killed(store, collapsed):
    process = command(collapsed, store / "output", "--ranks=2", "--healing-steps=2000")
    wait_for(store / "output", 2, process)
    followers = psutil.Process(process.pid).children(recursive=True)
    assert followers
    process.kill()
    process.communicate()
    assert psutil.wait_procs(followers, timeout=20)[1] == []


@pytest.mark.slow
def test_ranks_that_torchrun_started_heal_together(store, collapsed):
    launch = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python",
              sys.executable)  # fmt: skip
    process = command(collapsed, store / "output", "--healing-steps=4", launch=launch)
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    (run,) = runs()
    assert (run.info.status, run.data.tags["parallel"]) == ("FINISHED", "fsdp, 2 ranks")
    _, _, expected = whole(cell_of(collapsed, healing_steps=4))
    history = MlflowClient().get_metric_history(run.info.run_id, "loss")
    for point in history:
        assert point.value == pytest.approx(expected[point.step, "loss"], rel=TOLERANCE)
