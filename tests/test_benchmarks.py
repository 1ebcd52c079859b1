"""The benchmarks measure what they say: same batches, whole reports, counted work, tables."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import sys
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import mlflow
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from healing.curvature.hessian import twice_differentiable_attention
from healing.models.blocks import next_token_loss
from healing.training.precision import Precision

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks` is no installed package: it is imported from the checkout."""
    monkeypatch.syspath_prepend(ROOT)


CPU = torch.device("cpu")
WAYS = ("eigenvalues", "bases", "alignment")
PARTS = ("device_speed", "healing", "attack", "hessian_product", "lanczos")


def numbers(value: object) -> list[float]:
    """All numbers inside a JSON value."""
    if isinstance(value, dict):
        return [n for inner in value.values() for n in numbers(inner)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.fixture
def quick_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import gpu

    speed = {"flops_per_second": 1e10, "bytes_per_second": 1e10}
    monkeypatch.setattr(gpu, "device_speed", lambda *_: dict(speed))


def stub(monkeypatch: pytest.MonkeyPatch, **parts: object) -> None:
    from benchmarks import gpu

    for name in PARTS[1:]:
        monkeypatch.setattr(gpu, name, parts.get(name, lambda *_: {"value": 1.0}))


def out_of_memory(*_: object) -> dict:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")


def check_healing(healed: dict, bound: dict) -> None:
    """Three steps of 8 x 128 tokens, measured before and after, all blocks in one call."""
    assert (healed["steps"], healed["measurements"], healed["eigenvalue_calls"]) == (3, 2, 2)
    assert 0 < healed["eigenvalue_seconds"] < healed["measurement_seconds"]
    parts = healed["training_seconds"] + healed["measurement_seconds"]
    # What is neither training nor measuring is drawing batches and making records.
    assert 0.5 * healed["loop_seconds"] < parts <= healed["loop_seconds"]
    speed = 3 * 8 * 128 / healed["training_seconds"]
    assert healed["training_tokens_per_second"] == pytest.approx(speed)
    least = 3 * max(bound["compute_seconds"], bound["memory_seconds"])
    assert bound["share_training"] == pytest.approx(least / healed["training_seconds"])
    assert bound["share_total"] == pytest.approx(least / healed["loop_seconds"])


def check_attack(attacked: dict) -> None:
    """Four matrices in each of four blocks; ten steps, measured after the last."""
    assert (attacked["steps"], attacked["decompositions"], attacked["measurements"]) == (10, 16, 1)
    prepared = attacked["decomposition_seconds"] + attacked["search_seconds"]
    assert 0 < prepared <= attacked["prepare_seconds"]
    parts = [attacked[f"{x}_seconds"] for x in ("step", "diagnostics", "measurement")]
    assert min(parts) > 0
    assert sum(parts) <= attacked["run_seconds"]


def test_accelerator_benchmark_writes_finite_numbers_that_add_up(tmp_path):
    from benchmarks import gpu
    from benchmarks.gpu_wording import sentence

    gpu.benchmark("nano", 3, CPU, tmp_path)
    written = json.loads((tmp_path / "cpu_nano.json").read_text())
    for name in (*PARTS, *WAYS, "roofline"):
        assert numbers(written[name])
        assert all(math.isfinite(n) and n >= 0 for n in numbers(written[name])), name
    assert [written[name]["status"] for name in PARTS] == ["ok"] * len(PARTS)
    # Both ways give the same numbers: what they are compared for is their time.
    assert written["eigenvalues"]["largest_difference"] < 1e-12
    assert written["alignment"]["largest_difference"] < 1e-5
    assert sum(s["matrices"] for s in written["bases"]["shapes"].values()) == 16
    check_healing(written["healing"], written["roofline"])
    check_attack(written["attack"])
    found = written["lanczos"]
    assert (found["iterations"], found["products"]) == (8, 8 + 2)
    assert 0 < found["product_seconds"] < found["lanczos_seconds"]
    assert "3 steps, 2 measurements" in sentence(written)
    assert "(target" not in sentence(written)  # they are for an accelerator


def test_a_part_out_of_memory_is_recorded_and_the_next_goes_on(tmp_path, monkeypatch, quick_speed):
    from benchmarks import gpu
    from benchmarks.gpu_wording import sentence

    stub(monkeypatch, healing=out_of_memory, attack=out_of_memory)
    result = gpu.benchmark("nano", 2, CPU, tmp_path)
    written = json.loads((tmp_path / "cpu_nano.json").read_text())
    assert [written[name]["status"] for name in PARTS] == [
        "ok", "out of memory", "out of memory", "ok", "ok",
    ]  # fmt: skip
    assert written["attack"]["message"] == "CUDA out of memory. Tried to allocate 9 GiB."
    assert "peak_bytes" in written["attack"]
    assert written["hessian_product"]["value"] == 1.0
    assert written["roofline"]["step_seconds"] > 0  # known without the healing it is for
    lost = {"status": "out of memory"}
    words = sentence({**result, "hessian_product": lost, "lanczos": lost})
    assert words.count(": out of memory") == 4


def test_parts_after_the_deadline_are_recorded_as_left_out(tmp_path, quick_speed):
    from benchmarks import gpu
    from benchmarks.gpu_wording import sentence, table

    result = gpu.benchmark("nano", 2, CPU, tmp_path, deadline=0.0)
    assert {result[name]["status"] for name in (*PARTS, *WAYS)} == {"left out, the time was over"}
    assert sentence(result).count("left out") == len(PARTS) + len(WAYS) - 1
    assert "| – training | left out, the time was over |" in table([result])


def test_another_failure_leaves_the_earlier_numbers_on_disk(tmp_path, monkeypatch, quick_speed):
    from benchmarks import gpu

    def failing(*_: object) -> dict:
        raise RuntimeError("driver shut down")

    healed = {"steps": 4, "training_seconds": 2.0, "loop_seconds": 8.0}
    stub(monkeypatch, healing=lambda *_: healed, attack=failing)
    with pytest.raises(RuntimeError, match="driver shut down"):
        gpu.benchmark("nano", 2, CPU, tmp_path)
    written = json.loads((tmp_path / "cpu_nano.json").read_text())
    assert written["healing"]["training_seconds"] == 2.0
    assert written["roofline"]["share_training"] == 4 * written["roofline"]["share_total"]
    assert "attack" not in written
    assert [p.name for p in tmp_path.iterdir()] == ["cpu_nano.json"]


def test_every_part_begins_without_gradients_and_what_the_last_one_held(
    tmp_path, monkeypatch, quick_speed
):
    from benchmarks import gpu

    held, seen = [], []

    class Cycle:
        """Freed by the collector alone, as what an attack's closures hold."""

        def __init__(self) -> None:
            self.itself = self

    def leaves_much(loaded, *_):
        for parameter in loaded.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        held.append(weakref.ref(Cycle()))
        return {}

    def looks(loaded, *_):
        seen.append([p.grad for p in loaded.model.parameters()] + [held[0]()])
        return {}

    stub(monkeypatch, attack=leaves_much, hessian_product=looks)
    monkeypatch.setattr(gpu, "shares", lambda *_: {})
    gpu.benchmark("nano", 2, CPU, tmp_path)
    assert set(seen[0]) == {None}


def test_step_flops_are_those_that_torch_counts(nano):
    from benchmarks.roofline import step_flops

    windows = torch.randint(2000, (2, 16), generator=torch.Generator().manual_seed(0))
    # Written-out attention: the counter knows no fused one of the CPU.
    with FlopCounterMode(display=False) as counter, twice_differentiable_attention(nano.model):
        next_token_loss(nano.model, windows).backward()
    vocabulary, hidden = nano.model.get_input_embeddings().weight.shape
    # The model's own loss makes logits of the last token too, which predicts nothing.
    unused = 6 * 2 * vocabulary * hidden
    assert step_flops(nano.model, 2, 16) == counter.get_total_flops() - unused


def test_step_bytes_by_hand():
    from benchmarks.roofline import roofline, step_bytes

    # 12 embeddings, 6 entries of a matrix, 3 biases: 21 parameters
    model = torch.nn.Sequential(torch.nn.Embedding(6, 2), torch.nn.Linear(2, 3))
    plain = {"products": 2 * 4 * 6, "gradients": 4 * 21, "casts": 0, "optimiser": 28 * 21}
    assert step_bytes(model, Precision("fp32")) == plain
    # bf16: read twice; cast 4 read + 2 written, gradient 2 written + 2 read
    cast = plain | {"products": 2 * 2 * 6, "casts": 10 * 6}
    assert step_bytes(model, Precision("bf16")) == cast
    speed = {"flops_per_second": 10.0, "bytes_per_second": 4.0}
    slow = roofline(speed, 30, {"a": 1, "b": 3})
    assert (slow["compute_seconds"], slow["memory_seconds"]) == (3.0, 1.0)
    assert (slow["step_seconds"], slow["bound"]) == (3.0, "compute")
    assert roofline(speed, 30, {"a": 16})["bound"] == "memory"
    assert roofline(speed, 30, {"a": 16})["step_seconds"] == 4.0


def test_stopwatch_times_functions_and_class_methods_and_puts_them_back():
    from benchmarks.stopwatch import Stopwatch

    class Thing:
        size = 3

        @classmethod
        def of(cls, more: int) -> int:
            return cls.size + more

        def fails(self) -> None:
            raise ValueError("no")

    before, watch = dict(vars(Thing)), Stopwatch(CPU)
    with watch.on({"made": (Thing, "of"), "failed": (Thing, "fails")}):
        assert (Thing.of(1), Thing().of(2)) == (4, 5)
        with pytest.raises(ValueError, match="no"):
            Thing().fails()
    assert watch.calls == {"made": 2, "failed": 1}
    assert all(seconds > 0 for seconds in watch.seconds.values())
    assert dict(vars(Thing)) == before


@contextlib.contextmanager
def watched(model: torch.nn.Module) -> Iterator[list[tuple[bool, torch.Tensor, torch.Tensor]]]:
    """Whether it trains, tokens and embeddings of every forward pass inside."""
    embeddings, seen = model.get_input_embeddings(), []

    def record(module, args):
        seen.append((module.training, args[0].clone(), module.weight.detach().clone()))

    handle = embeddings.register_forward_pre_hook(record)
    try:
        yield seen
    finally:
        handle.remove()


def test_all_loops_see_the_same_batches_from_the_same_weights(corpus, nano, probe, tmp_path):
    import transformers

    from benchmarks import loops
    from healing.config.heal import HealConfig
    from healing.config.resolve import resolve_from_presets

    transformers.utils.logging.set_verbosity_error()
    settings = {"healing_steps": 3, "healing_lr": 1e-2, "measurement_interval": 2}
    config = resolve_from_presets(HealConfig(model="nano", corpus="stdlib", **settings))
    windows = corpus.windows("train", nano.tokenizer, config.sequence_length)
    drawn = loops.same_batches(config, windows)
    run = SimpleNamespace(metrics=lambda *_: None, flush=lambda: None)
    ways = {
        "bare": lambda: loops.bare(nano, config, drawn),
        "project": lambda: loops.project(nano, config, windows, probe, run, tmp_path),
        "Trainer": lambda: loops.trainer(nano, config, drawn, probe, tmp_path / "trainer"),
    }
    start = nano.model.get_input_embeddings().weight.detach().clone()
    for name, loop in loops.from_equal_weights(nano.model, ways).items():
        with watched(nano.model) as seen:
            assert loop() > 0
        trained = torch.stack([tokens for training, tokens, _ in seen if training])
        assert torch.equal(trained, drawn), name
        assert torch.equal(seen[0][2], start), name
        assert not torch.equal(nano.model.get_input_embeddings().weight, start), name
    # In an order of their own, not as they lie in the corpus.
    assert not torch.equal(drawn, windows[:24].view(3, 8, -1))


def test_targets_and_medians_by_hand():
    from benchmarks.table import Row, at_least, at_most

    assert Row("x", (3.0, 1.0, 2.0), "s").median == 2.0
    assert Row("x", (4.0, 1.0, 2.0, 3.0), "s").median == 2.5
    # The median decides, not the mean (3.4) or the best round; meeting it exactly is met.
    assert at_least("x", [2.0, 0.2, 8.0], "s", 2.0).met is True
    assert at_least("x", [1.9, 0.2, 8.0], "s", 2.0).met is False
    assert at_most("x", [2.0, 0.2, 8.0], "s", 2.0).met is True
    assert at_most("x", [2.1, 0.2, 8.0], "s", 2.0).met is False
    assert at_least("x", [1.0], "s", 0.8).cells() == ["x", "1", "", "1", "s", ">= 0.8", "met"]
    cells = at_most("x", [1234.5, 999.7, 0.12345], "MB", 7).cells()
    assert cells == ["x", "1,000", "0.123–1,234", "3", "MB", "<= 7", "MISSED"]


def test_table_in_markdown(tmp_path):
    from benchmarks.table import Row, at_least, load, markdown, save

    rows = [at_least("a | b", [3.0, 1.0, 2.0], "s", 1.5), Row("alone", (5.0,), "GB")]
    expected = (
        "| measured | median | range | n | unit | target | result |\n"
        "| --- | ---: | ---: | ---: | --- | --- | --- |\n"
        "| a \\| b | 2 | 1–3 | 3 | s | >= 1.5 | met |\n"
        "| alone | 5 |  | 1 | GB |  |  |\n"
    )
    assert markdown(rows) == expected
    save(str(tmp_path / "rows.json"), rows)
    assert markdown(load(tmp_path / "rows.json")) == expected


def test_final_table_goes_to_a_markdown_file(tmp_path, monkeypatch, capsys):
    from benchmarks import __main__ as everything
    from benchmarks.table import Row, markdown, save

    def stand_in(command, **_):
        module, path = command[2], command[command.index("--json") + 1]
        if module == "benchmarks.hvp":
            return SimpleNamespace(returncode=1)
        save(path, [Row(module, (1.0,), "s")])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(everything.subprocess, "run", stand_in)
    target = tmp_path / "table.md"
    words = ["x", "--only", "memory,hvp,logging", "--markdown", str(target)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match="failed: hvp"):
        everything.main()
    rows = [Row("benchmarks.memory", (1.0,), "s"), Row("benchmarks.overhead", (1.0,), "s")]
    assert target.read_text() == markdown(rows)
    assert "benchmarks.overhead" in capsys.readouterr().out


def test_spectra_have_a_target_for_one_size_only():
    from benchmarks.spectra import added_row

    assert added_row("70m", [0.1, 0.2, 0.3]).cells()[-2:] == ["<= 0.15", "MISSED"]
    assert added_row("micro", [0.1, 0.2, 0.3]).cells()[-2:] == ["", ""]


def test_memory_is_judged_by_the_median_of_its_rounds():
    from benchmarks.memory import compared

    one = compared("70m", "full", 2e9, [2.5e9])
    assert one.cells()[:4] == ["70m, full: predicted / measured peak (2.00 GB of 2.50 GB)", "0.8",
                               "", "1"]  # fmt: skip
    assert one.met is True
    three = compared("70m", "full", 2e9, [2.2e9, 1e9, 3e9])
    assert three.values == pytest.approx((2 / 2.2, 2.0, 2 / 3.0))
    assert three.met is True
    assert compared("70m", "full", 2e9, [2.6e9, 1e9, 2.7e9]).met is False
    assert compared("70m", "full", 2e9, [1.5e9, 1e9, 2e9]).met is False


def test_growth_is_of_seconds_per_cell():
    from benchmarks.sweeps import rows_of

    one = {"cells": 100.0, "first": 10.0, "again": 1.0, "summary": 2.0, "peak": 700.0}
    many = one | {"cells": 1000.0, "first": 160.0, "again": 14.0}
    rows = {row.what: row for row in rows_of("sqlite", [one, many])}
    assert rows["sqlite, 1000 cells, run"].values == pytest.approx((160.0,))
    first = rows["sqlite, first: growth a cell, 100 to 1000 cells"]
    again = rows["sqlite, again: growth a cell, 100 to 1000 cells"]
    assert (first.values, first.met) == (pytest.approx((1.6,)), False)
    assert (again.values, again.met) == (pytest.approx((1.4,)), True)


def test_the_runs_that_are_summarized_are_read_whole(tmp_path, monkeypatch):
    from benchmarks.summarize import LATEST, PARAMS, POINTS, TAGS, make_store
    from healing.config.summarize import SummarizeConfig
    from healing.stages.summarize import find_runs
    from healing.stages.summarize_inputs import read_runs

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)  # another test may have named its own
    make_store(tmp_path, 12)
    views = find_runs(SummarizeConfig(experiment="bench"))
    assert len(views) == 12
    assert (len(views[0].params), len(views[0].metrics)) == (PARAMS, LATEST)
    assert len(views[0].tags) == TAGS
    notes: list[str] = []
    runs = read_runs(views, notes.append)
    assert notes == []
    assert {(run.finished, len(run.steps)) for run in runs} == {(True, POINTS)}
