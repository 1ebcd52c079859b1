"""Chains of a sweep as descriptions, what they ask of a cluster, the board of their workers, and
their claims.
"""

from __future__ import annotations

import logging
import pathlib
import pickle
import platform
import re
import subprocess
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mlflow.tracking import MlflowClient

from healing.config.sweep import SweepConfig
from healing.errors import ConfigError, HealingError, MemoryLackError
from healing.progress import Stop, Stopped
from healing.stages import sweep as sweep_module
from healing.stages.cells import heal as heal_module
from healing.stages.driver import Driver
from healing.stages.dry_run import peak_memory
from healing.stages.launching import chain as description
from healing.stages.launching import chain_run as chain_module
from healing.stages.launching import claims, known_cells, ray_launcher, ray_worker, shares
from healing.stages.launching.board import Board, Ended, Now
from healing.stages.launching.chain import CellResult, at_one_commit, chains_of
from healing.stages.launching.chain_run import run_chain
from healing.stages.launching.claims import LEASE_SECONDS, ClaimedCells, Claims
from healing.stages.launching.ray_carrier import carried
from healing.stages.launching.ray_cluster import connected
from healing.stages.launching.ray_launcher import RayLauncher, lacking
from healing.stages.launching.ray_task import Task
from healing.stages.launching.ray_watch import died_text, warnings_to
from healing.stages.launching.ray_worker import scratch_of
from healing.stages.launching.shares import Machine, Share, share_of, shares_of
from healing.stages.launching.threads import ThreadLauncher
from healing.stages.sweep import launcher_of
from healing.stages.terminal.console import CellProgress, Cells, Console
from healing.stages.terminal.memory import is_lack
from healing.tracking import queries
from healing.tracking.local_store import LocalStore
from healing.tracking.open_runs import Above
from healing.tracking.processes import only_owner
from healing.tracking.sending.outbox import PLACE
from healing.tracking.sending.workers import in_folder_of_files


def config(**changes) -> SweepConfig:
    return SweepConfig(**({"models": "nano", "arms": "haep,none", "seeds": "0-1"} | changes))


def test_a_chain_is_a_description_that_travels():
    first, second = chains_of(config(), {})
    assert pickle.loads(pickle.dumps(first)) == first
    assert [c.arm for c in first.cells] == ["none", "haep"]
    assert (first.title, second.title) == ("nano seed 0", "nano seed 1")
    assert [first.runs(cell) for cell in first.cells] == [1, 2]
    assert [replace(first, config=config(basin=True)).runs(c) for c in first.cells] == [1, 3]


def test_a_chain_keeps_its_name_where_its_work_is_the_same():
    name = chains_of(config(), {})[1].name()
    same = config(seeds="1,5", workers=3, output_dir="elsewhere", launcher="ray", device="cpu")
    assert chains_of(same, {})[0].name() == name
    for other in ({"healing_steps": 7}, {"arms": "haep"}, {"batch_size": 3}, {"sham": False}):
        assert chains_of(config(seeds="1", **other), {})[0].name() != name or other == {
            "arms": "haep"  # the sham is there in any case
        }


def test_whoever_asks_for_it_gets_the_cluster():
    assert isinstance(launcher_of(config()), ThreadLauncher)
    assert isinstance(launcher_of(config(launcher="ray")), RayLauncher)
    with pytest.raises(ConfigError, match="--ray-address auto is for --launcher ray"):
        config(ray_address="auto")
    with pytest.raises(ConfigError, match="Ray chooses the GPU of each cell; give cuda"):
        config(launcher="ray", device="cuda:1")


class Followed:
    """A watch that refuses one arm."""

    def __init__(self, refused: str) -> None:
        self.refused, self.results, self.is_over = refused, list[CellResult](), False

    def begins(self, cell, runs):
        if cell.arm == self.refused:
            raise HealingError("tried often enough")
        self.is_over = True  # as where the sweep is stopped
        return CellProgress(self, runs)

    def tell(self, cell, share, text):
        """Nobody looks."""

    def ended(self, result):
        self.results.append(result)


def test_a_cell_that_is_not_to_be_tried_fails_and_the_others_go_on(tmp_path):
    settings = config(arms="none,random_tokens", healing_steps=1, batch_size=2, sequence_length=64,
                      seeds="0", attack_steps=1, output_dir=str(tmp_path))  # fmt: skip
    (chain,) = chains_of(settings, {})
    driver, watch = Driver(Console("quiet"), LocalStore()), Followed("none")
    with driver.process("sweep", {"stage": "main"}, settings.output_dir) as run:
        results = run_chain(chain, driver, run, watch)
    assert results == watch.results
    assert results[0].failure == "nano none seed 0: tried often enough"
    assert results[1].view is not None
    assert results[1].view.tags["arm"] == "random_tokens"


CPU_LACK = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 800000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize(
    "lack",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has 3 GiB"),
        RuntimeError(CPU_LACK),
        MemoryError(),
    ],
)
def test_a_cell_that_runs_out_of_memory_fails_and_says_what_was_predicted(
    tmp_path, monkeypatch, lack
):
    real = heal_module.training_windows

    def wanting(config, corpus, loaded):
        if config.arm == "random_tokens":
            raise lack
        return real(config, corpus, loaded)

    settings = config(arms="random_tokens,none", healing_steps=1, batch_size=2, sequence_length=64,
                      seeds="0", attack_steps=1, output_dir=str(tmp_path),
                      healer="none")  # fmt: skip
    (chain,) = chains_of(settings, {})
    monkeypatch.setattr(heal_module, "training_windows", wanting)
    driver, watch = Driver(Console("quiet"), LocalStore()), Followed("")
    with driver.process("sweep", {"stage": "main"}, settings.output_dir) as run:
        for cell in chain.cells:  # a watch of its own, that does not end the chain
            watch.is_over = False
            run_chain(replace(chain, cells=(cell,)), driver, run, watch)
    failed = {r.cell.arm: r.failure for r in watch.results}
    assert failed.pop("none") == ""
    (failure,) = failed.values()
    said = (str(lack) or "MemoryError").split("\n")[0]
    assert failure.startswith("nano random_tokens seed 0: memory ran out (")
    assert said[:60] in failure
    assert "use a smaller batch, window or model" in failure
    peak = re.search(r"\(predicted: ([\d.]+) GB at its peak\)", failure)
    assert peak
    assert 0.0 < float(peak[1]) < 10.0


def test_what_cannot_be_predicted_ends_no_chain(monkeypatch):
    """The failure that it would stand beside is told without it."""
    (chain,) = chains_of(config(arms="haep,gaussian_noise", seeds="0"), {})
    attacked = [cell for cell in chain.cells if cell.arm == "haep"]
    assert chain_module.predicted_bytes(chain, attacked[0]) > 0

    def contradicted(*_):
        raise ConfigError("--healing-lr and --healer")

    monkeypatch.setattr(chain_module, "heal_config", contradicted)
    assert {chain_module.predicted_bytes(chain, cell) for cell in chain.cells} == {0}
    assert chain_module._predicted(chain, chain.cells[0]) == " (none is predicted)"


def test_the_kernels_own_message_of_the_cpu_is_recognized():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**14)
    assert is_lack(caught.value)
    assert not is_lack(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lack(HealingError("out of memory"))


def test_memory_is_predicted_for_the_arm_that_takes_most(monkeypatch):
    # What this process takes by itself is part of it, and grows as it likes.
    monkeypatch.setattr(peak_memory, "resident_bytes", lambda: 3 * 10**8)
    both = [config(arms=arms, seeds="0") for arms in ("haep,random_tokens", "random_tokens,haep")]
    first, second = (shares.predicted_peak(chains_of(c, {})[0]) for c in both)
    alone = [shares.predicted_peak(chains_of(config(arms=a, seeds="0"), {})[0])
             for a in ("haep", "random_tokens")]  # fmt: skip
    assert first == pytest.approx(second, rel=0.01)
    assert first == pytest.approx(max(alone), rel=0.01)
    assert min(alone) < 0.95 * max(alone)


ONE = Machine("10.0.0.1", 8.0, 0.0)
SMALL = Machine("10.0.0.2", 4.0, 0.0)
GPUS = Machine("10.0.0.3", 32.0, 4.0)
HEAD = Machine("10.0.0.4", 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "there", "expected"),
    [
        ({}, [ONE], Share(1, 0.0, 700)),  # nano computes on one thread
        ({"models": "70m"}, [ONE, SMALL, HEAD], Share(4, 0.0, 700)),
        ({"models": "70m"}, [ONE, GPUS], Share(1, 1.0, 0)),  # of a GPU Ray knows no bytes
        ({"models": "70m", "device": "cpu"}, [ONE, GPUS], Share(8, 0.0, 700)),
        ({"models": "70m", "device": "cuda"}, [ONE], Share(1, 1.0, 0)),
        ({"worker_gpus": 0.25, "worker_cpus": 2, "worker_memory": 3.0}, [GPUS],
         Share(2, 0.25, 3 * 10**9)),
        ({"worker_memory": 0}, [ONE], Share(1, 0.0, 0)),
    ],
)  # fmt: skip
def test_what_a_cell_takes(monkeypatch, changes, there, expected):
    monkeypatch.setattr(shares, "predicted_peak", lambda chain: 700)
    chain = chains_of(config(launcher="ray", **changes), {})[0]
    assert share_of(chain, there) == expected


def test_memory_is_predicted_once_for_a_model(monkeypatch):
    asked = []

    def predicted(chain):
        asked.append(chain.title)
        return len(asked) * 10**9

    monkeypatch.setattr(shares, "predicted_peak", predicted)
    chains = chains_of(config(launcher="ray", models="nano,micro", seeds="0-2"), {})
    found = shares_of(chains, [ONE])
    assert asked == ["micro seed 0", "nano seed 0"]
    assert [share.memory for share in found] == [10**9] * 3 + [2 * 10**9] * 3
    assert str(found[0]) == "1 CPU(s), 1.00 GB"


def test_what_no_machine_has_is_said():
    assert "a cell takes 16 CPU(s), and no machine" in lacking([Share(16, 0.0, 0)], [ONE, SMALL])
    assert "1 CPU(s), 1 GPU(s)" in lacking([Share(1, 0.0, 0), Share(1, 1.0, 0)], [ONE])
    assert "2.00 GB" in lacking([Share(1, 0.0, 2 * 10**9)], [replace(ONE, memory=1e9)])
    assert lacking([Share(8, 0.0, 0)], [ONE, SMALL]) == ""


def test_a_store_in_a_file_is_not_for_several_machines(monkeypatch, store):
    here = replace(ONE, host=platform.node())
    several = ([here, SMALL], [replace(ONE, host="a server, from a laptop")])
    ray_launcher._require_store_of_all([here, here])
    for there in several:
        with pytest.raises(ConfigError, match="a file of this one: start a server"):
            ray_launcher._require_store_of_all(there)
    monkeypatch.setattr(ray_launcher, "is_file_of_one_machine", lambda: False)  # PostgreSQL, say
    for there in several:
        ray_launcher._require_store_of_all(there)


def test_a_machine_that_does_not_see_what_others_store_is_given_nothing(store):
    chain, above = chains_of(config(), {})[0], Above("1", "2", "sweep", {})
    folder = MlflowClient().create_experiment("in a folder")
    server = MlflowClient().create_experiment("s3", artifact_location="s3://bucket/place")
    code = ray_worker.code_here()

    def why(**changes) -> str:
        return ray_worker.why_unfit(Task(0, chain, above, {}, "/", code, **changes), "node 7")

    with in_folder_of_files(server) as proof:
        assert proof == ""
    with in_folder_of_files(folder) as proof:
        assert why(proof=proof) == ""
        elsewhere = proof.replace(str(store), "/elsewhere")
        assert f"go to {pathlib.Path(elsewhere).parent}, which is another" in why(proof=elsewhere)
    assert not pathlib.Path(proof).exists()
    assert why(only_on="node 7") == why(only_on="") == ""
    assert why(only_on="laptop").startswith("MLFLOW_TRACKING_URI is a file of laptop: start a")
    other = ray_worker.why_unfit(Task(0, chain, above, {}, "/", "other"), "node 7")
    assert other.startswith("it has other code than this command")


def test_what_a_key_is_made_of_is_shown_and_can_be_stopped(tmp_path, monkeypatch):
    """A long text, a large model: nothing of the cell has a run yet."""
    (chain,) = chains_of(config(seeds="0", arms="none", output_dir=str(tmp_path)), {})
    said: list[str] = []
    hears = SimpleNamespace(tell=lambda cell, share, text: said.append(text))
    driver = Driver(Console("quiet", CellProgress(hears, 1)), LocalStore())
    assert len(chain_module._key(chain, chain.cells[0], driver)) == 16
    assert "nano none seed 0, reading text" in said
    driver.stop.set()
    with pytest.raises(Stopped):
        chain_module._key(chain, chain.cells[0], driver)

    def lacking(config):
        raise MemoryError

    driver.stop = Stop()
    monkeypatch.setattr(known_cells, "corpus_for", lacking)
    with pytest.raises(MemoryLackError, match=r"memory ran out \(reading text\)"):
        chain_module._key(chain, chain.cells[0], driver)


def test_what_is_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(ConfigError, match=r"needs Ray: pip install 'llm-healing\[ray\]'"),
        connected(""),
    ):
        pass
    driver = Driver(Console("quiet"), LocalStore())
    with (
        driver.process("sweep", {"stage": "main"}) as run,
        pytest.raises(ConfigError, match="needs a tracking store that is there"),
    ):
        RayLauncher(config(launcher="ray")).run([], driver, run)


def test_a_board_counts_the_tries_of_the_cell_that_its_worker_died_in():
    board, now = Board(), Now(0, 2, 0.5, "heal 3/60")
    assert board.enters(4, "a") == 1
    assert board.begins((4, 0), "a", now) == (1, 1)
    board.ended((4, 0), Ended(4, "first", "", "partial"))
    # The second answer was lost, and the worker asks again.
    assert [board.begins((4, 1), "a", now) for _ in range(2)] == [(1, 1), (1, 1)]
    assert [board.enters(4, "b") for _ in range(2)] == [2, 2]  # the first died in the second cell
    assert board.begins((4, 0), "b", now) == (1, 1)  # found again
    board.ended((4, 0), Ended(4, "first", "", "partial"))
    assert board.begins((4, 1), "b", now) == (2, 2)
    seen = board.read()
    assert seen.ended == [Ended(4, "first", "", "partial")]
    assert (seen.died, seen.now) == ({4: 1}, {4: now})
    board.leaves(4)
    board.say("a warning")
    assert [board.read().said for _ in range(2)] == [["a warning"], []]
    assert (board.read().ended, board.read().now) == ([], {})


def test_tries_that_come_further_are_not_in_vain():
    """As where machines are taken away again and again while a long cell goes on."""
    board, now, place = Board(), Now(0, 2, 0.0, ""), (0, 0)
    # Where each try goes on: runs of the cell that are over, and steps; None where it died before.
    since = [(0, 0), (0, 0), (0, 40), (0, 80), (1, 0), None, (1, 0), (1, 20)]
    vain = []
    for n, point in enumerate(since):
        tries, in_vain = board.begins(place, f"worker {n}", now)
        assert tries == n + 1
        vain.append(in_vain)
        if point is not None:
            board.goes_on(place, point)
    assert vain == [1, 2, 3, 2, 2, 2, 3, 4]
    assert board.begins(place, "worker 8", now) == (9, 2)


def test_what_dead_workers_left_of_chains_that_are_over_is_removed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda answer: answer))
    board = Board()
    board.leaves(0, "over")
    board.leaves(1, "unsent")
    board.leaves(2, "taken")
    board.leaves(3)  # it was stopped
    for name in ("over", "unsent", "taken", "stopped"):
        (tmp_path / name).mkdir()
    (tmp_path / "unsent" / PLACE).mkdir()
    asked = SimpleNamespace(done_with=SimpleNamespace(remote=board.done_with))
    with only_owner(tmp_path / "taken", pytest.fail):
        ray_worker._tidy(tmp_path, asked)
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"unsent", "taken", "stopped"}


class Bar:
    """What a bar is told."""

    def begin(self, total, unit):
        self.text = ""

    def step(self, done, text):
        self.text = text

    def part(self, share, text):
        self.text = text


def test_the_bar_counts_what_is_found_again_and_what_fails_as_a_whole():
    chains = chains_of(config(launcher="ray", arms="haep,random_tokens", sham=False), {})
    tasks = [SimpleNamespace(chain=chain, memory=0) for chain in chains]
    board, bar = Board(), Bar()
    cells = Cells(bar, 4, "cell")
    ray = SimpleNamespace(get=lambda answer, timeout=0: answer, exceptions=ray_exceptions())
    shown = ray_launcher._Tasks(ray, tasks, [], config(), Driver(Console("quiet")), cells)
    asked = SimpleNamespace(read=SimpleNamespace(remote=board.read))

    def works(chain: int, cell: int, worker: str) -> str:
        board.begins((chain, cell), worker, Now(cell, 2, 0.1, "heal"))
        shown._show(asked)
        return bar.text

    assert works(0, 0, "a") == "1 running, 3 queued; heal"
    board.ended((0, 0), Ended(0, "first", "", "partial"))
    assert works(0, 1, "a") == "1 running, 2 queued; heal"
    assert works(1, 0, "b") == "2 running, 1 queued; heal"
    # The first worker dies, and another finds its first cell again.
    assert works(0, 0, "c").startswith("2 running, 1 queued")
    board.ended((0, 0), Ended(0, "first", "", "partial"))
    assert works(0, 1, "c").startswith("2 running, 1 queued")
    # Both chains fail as a whole.
    for number in (0, 1):
        board.leaves(number)
        assert len(shown._failures(number, "the store did not come back")) == 2
    assert bar.text == "0 running, 0 queued, 3 failed; last: nano random_tokens seed 1"


def ray_exceptions():
    return SimpleNamespace(RayError=RuntimeError)


def test_a_machine_without_the_package_says_so():
    """What Ray carries there is loaded where nothing of this package is."""
    cloudpickle = pytest.importorskip("ray.cloudpickle", reason="Ray is not installed")
    carried_there = cloudpickle.dumps(carried())
    script = (
        "import pickle, ray, sys, types\n"
        "sys.modules['healing'] = None\n"
        "here = types.SimpleNamespace(get_node_id=lambda: 'node 7')\n"
        "ray.get_runtime_context = lambda: here\n"
        "run = pickle.loads(sys.stdin.buffer.read())\n"
        "print(*run(b'', None), sep='|')\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], input=carried_there, capture_output=True, check=False
    )
    assert found.returncode == 0, found.stderr.decode()
    node, machine, why = found.stdout.decode().strip().split("|")
    assert (node, machine) == ("node 7", platform.node())
    assert why.startswith("this package cannot be loaded there (ModuleNotFoundError: ")


def test_the_page_names_the_device_of_a_cluster_and_none_that_this_machine_must_have(store):
    def result(device: str) -> CellResult:
        view = queries.RunView("1", "n", "FINISHED", "1", {}, {"device": device}, {})
        return CellResult(chains_of(config(), {})[0].cells[0], view)

    there = config(launcher="ray", device="cuda")
    assert sweep_module._device(there, [result("cuda"), result("cuda")]) == "cuda"
    assert sweep_module._device(there, []) == "cuda"
    unasked = config(launcher="ray")
    assert sweep_module._device(unasked, [result("cuda")]) == "cuda"
    assert sweep_module._device(unasked, [result("cuda"), result("cpu")]) == "auto"
    assert sweep_module._device(config(), []) in ("cpu", "cuda")


def test_all_processes_of_a_sweep_read_one_commit_of_a_data_set(monkeypatch, tmp_path):
    asked, pinned = [], []

    def commit_of(dataset):
        asked.append(dataset)
        if dataset == "own/away":
            raise ConnectionError("away")
        return "c" * 40

    monkeypatch.setattr(description, "commit_of", commit_of)
    monkeypatch.setattr(chain_module, "pin", lambda *what: pinned.append(what))
    chains = chains_of(config(models="70m,410m,nano"), {})  # `auto`: the Pile, and nano's own text
    found = at_one_commit(chains)
    assert asked == ["monology/pile-uncopyrighted"]
    commits = {chain.title: chain.commits for chain in found}
    assert commits["nano seed 0"] == ()
    pile = ("monology/pile-uncopyrighted", "c" * 40)
    assert commits["70m seed 0"] == commits["410m seed 1"] == (pile,)
    assert [chain.name() for chain in found] == [chain.name() for chain in chains]
    named = at_one_commit(chains_of(config(corpus="own/texts:english"), {}))
    assert {chain.commits for chain in named} == {(("own/texts", "c" * 40),)}
    for left in ("own/away", str(tmp_path), "mistyped.txt", "./own/mistyped"):
        assert {c.commits for c in at_one_commit(chains_of(config(corpus=left), {}))} == {()}
    assert asked[-1] == "own/away", "the Hub is not told how files here are called"
    watch = Followed("")
    watch.is_over = True
    assert run_chain(named[0], Driver(Console("quiet"), LocalStore()), None, watch) == []
    assert pinned == [("own/texts", "c" * 40)]


def test_what_a_worker_warns_of_is_told():
    said = []
    with warnings_to(said.append):
        logging.getLogger("healing.data.corpora").warning("the text is the one used last")
        logging.getLogger("another").warning("not ours")
    logging.getLogger("healing.data.corpora").warning("afterwards")
    assert said == ["warning: the text is the one used last"]


def test_no_login_is_in_the_text_of_a_task():
    chain = chains_of(config(), {})[0]
    store = {"MLFLOW_TRACKING_PASSWORD": "hunter2"}
    task = Task(0, chain, Above("1", "2", "sweep", {}), store, "/", "code")
    assert "hunter2" not in repr(task)


def test_a_board_hands_on_a_stop():
    board, now = Board(), Now(0, 1, 0.0, "")
    assert board.tell(0, now) is None
    board.stop(15)
    assert board.tell(0, now) == 15


def test_why_a_cell_is_given_up_names_the_memory_that_it_had():
    assert "each of 3 tries in a row, none of which came further: killed" in died_text(3, 0)
    assert "came further; it was given 1.50 GB: killed" in died_text(3, 1_500_000_000)


def test_nodes_of_one_machine_have_folders_of_their_own(tmp_path):
    first, second = (scratch_of(str(tmp_path), node * 20) for node in "ab")
    assert first.is_dir()
    assert second.is_dir()
    assert first != second
    (tmp_path / "file").write_text("")
    with pytest.raises(HealingError, match=r"--worker-dir: .* cannot be used"):
        scratch_of(str(tmp_path / "file"), "c" * 20)


def test_a_claim_is_one_holders_until_it_is_given_back_or_its_lease_is_over():
    now = [100.0]
    held = Claims(lambda: now[0])
    assert held.take("cell", "a") == "a"
    assert held.take("cell", "b") == "a"
    assert held.take("another", "b") == "b"
    now[0] += LEASE_SECONDS - 1
    assert held.take("cell", "a") == "a"  # its holder is there
    now[0] += LEASE_SECONDS - 1
    assert held.take("cell", "b") == "a"
    now[0] += 1
    assert held.take("cell", "b") == "b"  # nothing was heard of a for a lease
    assert held.take("cell", "a") == "b"
    held.give_back("cell", "a")  # comes back late
    assert held.take("cell", "a") == "b"
    held.give_back("cell", "b")
    assert held.take("cell", "a") == "a"


def asked_of(held: Claims):
    return lambda method, key, holder: getattr(held, method)(key, holder)


def test_who_comes_second_waits_and_is_told_for_whom(monkeypatch):
    monkeypatch.setattr(claims, "LOOK_SECONDS", 0)
    held, told, order = Claims(), [], []
    first, second = (ClaimedCells(asked_of(held), name, "7") for name in ("first", "second"))
    inside = first("f", pytest.fail)
    inside.__enter__()

    def waiting(text: str) -> None:
        told.append(text)
        if len(told) == 3:
            order.append("first is through")
            inside.__exit__(None, None, None)

    with second("f", waiting):
        order.append("second begins")
    assert told == ["waiting for first, which computes the same"] * 3
    assert order == ["first is through", "second begins"]
    assert held.take("7/f", "anybody") == "anybody"  # given back


def test_claims_are_of_one_experiment_and_cell(monkeypatch):
    held = Claims()
    with ClaimedCells(asked_of(held), "a", "1")("f", pytest.fail):
        with ClaimedCells(asked_of(held), "b", "2")("f", pytest.fail):
            pass
        with ClaimedCells(asked_of(held), "b", "1")("g", pytest.fail):
            pass


def test_a_claim_is_renewed_while_the_cell_is_computed(monkeypatch):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.001)
    words, renewed = [], threading.Event()

    def ask(method: str, key: str, holder: str) -> str:
        words.append(method)
        if words.count("take") == 5:
            renewed.set()
        return holder

    with ClaimedCells(ask, "a", "1")("f", pytest.fail):
        assert renewed.wait(60)
    assert words[-1] == "give_back"
    assert not any(t.name == "renews a claim" for t in threading.enumerate())


def test_who_is_told_to_stop_while_it_waits_claims_nothing(monkeypatch):
    monkeypatch.setattr(claims, "LOOK_SECONDS", 0)
    held = Claims()
    held.take("1/f", "a")

    def waiting(text: str) -> None:
        raise Stopped(15)

    with pytest.raises(Stopped), ClaimedCells(asked_of(held), "b", "1")("f", waiting):
        pytest.fail("it is another's")
    held.give_back("1/f", "a")
    assert held.take("1/f", "c") == "c"


def test_without_an_answer_a_cell_is_computed():
    with ClaimedCells(lambda *_: None, "a", "1")("f", pytest.fail):
        pass
