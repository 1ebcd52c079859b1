"""``--launcher ray``: the chains of a sweep as tasks of a Ray cluster.

Ray schedules, and runs a task again whose worker or machine died. Here it is decided what there is
to do, how much each task may take, and when all is over; results come back as descriptions of
stored runs.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import platform
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from healing.config.options import AUTO
from healing.config.sweep import SweepConfig
from healing.errors import ConfigError, HealingError, OutageError, TrackingError
from healing.progress import Stopped
from healing.stages.driver import Driver
from healing.stages.launching.board import Board, Seen
from healing.stages.launching.chain import CellResult, Chain, is_of, shared_out
from healing.stages.launching.ray_carrier import carried
from healing.stages.launching.ray_cluster import ON_HEAD, connected, elsewhere, machines
from healing.stages.launching.ray_task import Task, Unfit
from healing.stages.launching.ray_worker import code_here
from healing.stages.launching.shares import CPU, Machine, Share, shares_of
from healing.stages.terminal.console import CellProgress, Cells
from healing.tracking.open_runs import Above
from healing.tracking.queries import PARENT, RunView
from healing.tracking.run import Run
from healing.tracking.sending.workers import (
    close_orphans,
    close_runs_below,
    finished_views,
    in_folder_of_files,
    is_file_of_one_machine,
    settings_of_store,
)
from healing.tracking.store import MlflowStore

LOOK_SECONDS = 1.0
"""Between two looks at the board."""
DEATHS = 20
"""Of a chain's workers, for every try of each of its cells: some come to nothing before a cell
begins, and those of machines that are taken away again and again are no failures."""
ANSWER_SECONDS = 10.0
"""That the board has to answer."""


class RayLauncher:
    """Runs chains on a Ray cluster.

    Args:
        config: Of the sweep.
    """

    def __init__(self, config: SweepConfig) -> None:
        self._config = config

    def run(self, chains: Sequence[Chain], driver: Driver, run: Run) -> list[CellResult]:
        """Every chain; results in the order of the plan.

        Raises:
            ConfigError: There is no cluster, nothing is tracked, or workers cannot reach the store.
        """
        above = Above.of(run)
        if above is None or not isinstance(driver.store, MlflowStore):
            raise ConfigError(
                "--launcher ray needs a tracking store that is there: workers hand their results "
                "on through it (MLFLOW_TRACKING_URI)"
            )
        with connected(self._config.ray_address) as ray:
            there = machines(ray)
            _require_store_of_all(there)
            predicted = self._config.worker_memory == AUTO
            doing = driver.console.doing("predicting the memory of a cell")
            with doing if predicted else contextlib.nullcontext():
                shares = shares_of(chains, there)
            if wanting := lacking(shares, there):
                if not self._config.ray_address:
                    raise ConfigError(f"{wanting}: lower --worker-cpus, -gpus or -memory")
                driver.console.say(f"note: {wanting}; it is waited for until one is added")
            driver.console.say(
                f"ray: {len(there)} node(s) with {sum(m.cpus for m in there):g} CPUs and "
                f"{sum(m.gpus for m in there):g} GPUs; a cell takes {shares[0]}"
            )
            driver.store.catch_up()
            with contextlib.suppress(OutageError):  # away for now: the next sweep does it
                close_orphans(above.experiment_id)
            total = sum(len(chain.cells) for chain in chains)
            with (
                in_folder_of_files(above.experiment_id) as proof,
                driver.console.cells(total, "sweep", "cell") as cells,
            ):
                tasks = [
                    _task(number, chain, share, above, proof)
                    for number, (chain, share) in enumerate(zip(chains, shares, strict=True))
                ]
                return _Tasks(ray, tasks, shares, self._config, driver, cells).run(above)


def _task(number: int, chain: Chain, share: Share, above: Above, proof: str) -> Task:
    config = chain.config
    # A machine may have a GPU that was not asked for.
    device = CPU if not share.gpus and config.device == AUTO else config.device
    return Task(
        number,
        chain.below(config.output_dir, device=device),
        above,
        settings_of_store(),
        os.getcwd(),
        code_here(),
        share.memory,
        platform.node() if is_file_of_one_machine() else "",
        proof,
    )


def _require_store_of_all(there: Sequence[Machine]) -> None:
    """Refuse a store that is a file of this machine, where others are to use it."""
    is_one = len({m.address for m in there}) == 1 and {m.host for m in there} <= {platform.node()}
    if is_file_of_one_machine() and not is_one:
        raise ConfigError(
            "--launcher ray on several machines needs a store that all of them reach, and "
            "MLFLOW_TRACKING_URI is a file of this one: start a server (docs/cluster.md)"
        )


def lacking(shares: Sequence[Share], there: Sequence[Machine]) -> str:
    """What no machine of the cluster has, in words; empty where there is nothing."""
    for share in shares:
        if not any(machine.has(share) for machine in there):
            return f"a cell takes {share}, and no machine of the cluster has as much"
    return ""


class _Tasks:
    """The tasks of one sweep.

    Args:
        ray: The library, connected.
        tasks: One for every chain.
        shares: What each takes.
        config: Of the sweep.
        driver: Of the command.
        cells: Shows them.
    """

    def __init__(
        self,
        ray: Any,
        tasks: Sequence[Task],
        shares: Sequence[Share],
        config: SweepConfig,
        driver: Driver,
        cells: Cells,
    ) -> None:
        self._ray, self._tasks, self._shares = ray, tasks, shares
        self._config, self._driver, self._cells = config, driver, cells
        self._waiting = deque(range(len(tasks)))
        self._pending: dict[Any, int] = {}
        self._results: dict[int, list[CellResult]] = {}
        self._shown: dict[tuple[int, int], CellProgress] = {}
        self._died: dict[int, int] = {}
        self._unfit: dict[str, Unfit] = {}
        self._ended: Counter[int] = Counter()

    def run(self, above: Above) -> list[CellResult]:
        """Until all are over.

        Args:
            above: Run of the command.
        """
        ray = self._ray
        board = ray.remote(Board).options(**ON_HEAD).remote()
        remote = ray.remote(carried())
        chains = [task.chain for task in self._tasks]
        models = {chain.cells[0].label for chain in chains}
        found: dict[str, RunView] = {}
        with contextlib.suppress(OutageError):  # each worker asks for itself then
            found = finished_views(above.experiment_id, models, is_of(chains))
        known = shared_out(chains, found)
        try:
            while self._waiting or self._pending:
                self._submit(remote, board, known)
                over, _ = ray.wait(list(self._pending), timeout=LOOK_SECONDS)
                self._show(board)  # what a chain said before it was over
                for ref in over:
                    self._take(ref)
                if self._driver.stop.is_set():
                    raise Stopped(self._driver.stop.signum)
            self._show(board)
        except BaseException:
            with self._driver.stop.saving():  # the time is bounded here
                self._end(board)
            raise
        finally:
            with self._unless_gone():
                ray.kill(board)
            left = "its worker is gone, and ended without ending it"
            with contextlib.suppress(TrackingError):  # a store that is away: the next sweep does it
                close_runs_below(above.experiment_id, above.run_id, left)
        results = [result for n in range(len(self._tasks)) for result in self._results[n]]
        return [_of_this_sweep(result, above.run_id) for result in results]

    def _submit(self, remote: Any, board: Any, known: Sequence[Mapping[str, RunView]]) -> None:
        """Hand over what may run: everything, or as much as ``--workers`` says."""
        most = len(self._tasks) if self._config.workers == AUTO else int(self._config.workers)
        while self._waiting and len(self._pending) < most:
            number = self._waiting.popleft()
            task, share = self._tasks[number], self._shares[number]
            # A worker that dies takes its chain along. The tries of a cell are the board's, which
            # does not count those that came further than the one before.
            deaths = DEATHS * (self._config.retries + 1) * len(task.chain.cells)
            asked = remote.options(
                num_cpus=share.cpus,
                num_gpus=share.gpus,
                memory=share.memory or None,
                max_retries=deaths,
                retry_exceptions=False,
                label_selector=elsewhere(self._unfit),
                name=f"llm-healing {task.chain.title}",
            )
            description = pickle.dumps((task, known[number]))
            self._pending[asked.remote(description, board)] = number

    def _take(self, ref: Any) -> None:
        """What became of a chain.

        Raises:
            Exception: What no part of the program expected.
        """
        number = self._pending.pop(ref)
        errors = self._ray.exceptions
        try:
            results = self._ray.get(ref)
        except HealingError as error:
            results = self._failures(number, str(getattr(error, "cause", error)))
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            why = " ".join(str(error).split())[:300]
            times = self._died.get(number, 0) + 1
            results = self._failures(number, f"its worker died {times} times ({why})")
        if results is None:  # it was told to stop
            raise Stopped(self._driver.stop.signum)
        if isinstance(results, tuple):
            self._hand_on(number, Unfit(*results))
        else:
            self._results[number] = results

    def _hand_on(self, number: int, unfit: Unfit) -> None:
        """A machine that can run nothing gets no more chains; what it was given goes elsewhere, if
        there is another that is large enough.
        """
        if unfit.node not in self._unfit:
            self._driver.console.say(f"note: {unfit.machine} is given no chains: {unfit.why}")
        self._unfit[unfit.node] = unfit
        left = [machine for machine in machines(self._ray) if machine.node not in self._unfit]
        if any(machine.has(self._shares[number]) for machine in left):
            self._waiting.appendleft(number)
            return
        why = "; ".join(sorted({f"{m.machine}: {m.why}" for m in self._unfit.values()}))
        said = f"no machine of the cluster can run it ({why})"
        self._results[number] = self._failures(number, said)

    def _failures(self, number: int, why: str) -> list[CellResult]:
        """Of a chain whose cells are not known one by one: what of them finished is found by the
        same command.
        """
        chain = self._tasks[number].chain
        self._driver.console.say(f"failed: {chain.title}: {why}")
        shown = [self._shown.pop(place) for place in list(self._shown) if place[0] == number]
        for cell in chain.cells[self._ended[number] :]:
            own = shown.pop() if shown else self._cells.cell(1)
            self._cells.over(own, cell.title, failed=True)
        return [CellResult(cell, failure=f"{cell.title}: {why}") for cell in chain.cells]

    def _show(self, board: Any) -> None:
        """Move the bar by what the workers said."""
        try:
            seen: Seen = self._ray.get(board.read.remote(), timeout=ANSWER_SECONDS)
        except self._ray.exceptions.RayError:
            return  # it shows, and decides nothing
        for chain, count in seen.died.items():
            if count > self._died.get(chain, 0):
                title = self._tasks[chain].chain.title
                self._driver.console.say(f"{title}: its worker died, and it is run again")
        self._died = seen.died
        for text in seen.said:
            self._driver.console.say(text)
        for ended in seen.ended:
            self._ended[ended.chain] += 1
            places = [place for place in self._shown if place[0] == ended.chain]
            shown = self._shown.pop(places[0]) if places else self._cells.cell(1)
            self._cells.over(shown, ended.title, failed=bool(ended.failure))
            if ended.failure:
                self._driver.console.say(f"failed: {ended.failure}")
            else:
                self._driver.console.detail(f"{ended.title}: {ended.verdict}")
        if not seen.now and self._pending:
            self._cells.waiting("waiting for a worker")
        for chain, now in seen.now.items():
            if chain in self._results:
                continue
            place = (chain, max(0, now.cell))  # before its first it has none
            for other in [p for p in self._shown if p[0] == chain and p != place]:
                self._cells.left(self._shown.pop(other))  # found again after its worker died
            shown = self._shown.setdefault(place, self._cells.cell(now.runs))
            self._cells.tell(shown, now.share, now.text)

    def _end(self, board: Any) -> None:
        """End every task: what runs at its next safe point, what waits at once, and what does
        neither in time by force.
        """
        ray, signum = self._ray, self._driver.stop.signum
        with self._unless_gone():
            ray.get(board.stop.remote(signum), timeout=ANSWER_SECONDS)
            seen: Seen = ray.get(board.read.remote(), timeout=ANSWER_SECONDS)
            for ref, number in self._pending.items():
                if number not in seen.now:
                    ray.cancel(ref, force=False)
        asked = self._driver.stop.since or time.monotonic()
        end, left = asked + self._config.ending_seconds, list(self._pending)
        while left and (seconds := end - time.monotonic()) > 0:
            try:
                _, left = ray.wait(left, num_returns=len(left), timeout=seconds)
            except (ray.exceptions.RayError, ValueError):
                time.sleep(min(LOOK_SECONDS, seconds))  # a cluster that is gone
        for ref in left:
            with self._unless_gone():
                ray.cancel(ref, force=True)

    @contextlib.contextmanager
    def _unless_gone(self) -> Iterator[None]:
        """A cluster that is gone has nothing to end."""
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            yield


def _of_this_sweep(result: CellResult, run_id: str) -> CellResult:
    """A run that an earlier try of the same sweep finished was not found again from before."""
    own = result.view is not None and result.view.tags.get(PARENT) == run_id
    return replace(result, reused=result.reused and not own)
