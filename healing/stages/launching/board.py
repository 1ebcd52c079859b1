"""What the workers of a sweep say of their cells, for the command that waits for them, and what the
command says to them: an actor's content, without Ray.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

Place = tuple[int, int]
"""Number of a chain, and of a cell in it."""
Point = tuple[int, int]
"""How far a cell is: how many of its runs are over, and steps of the next."""


@dataclass
class _Try:
    """One worker at a cell.

    Attributes:
        worker: Which.
        since: Where it went on.
    """

    worker: str
    since: Point = (0, 0)


@dataclass(frozen=True)
class Now:
    """What a worker is doing.

    Attributes:
        cell: Number of the cell in its chain.
        runs: Of the cell.
        share: Of the cell that is done, from 0 to 1.
        text: Its run with phase and step.
    """

    cell: int
    runs: int
    share: float
    text: str


@dataclass(frozen=True)
class Ended:
    """A cell that is over.

    Attributes:
        chain: Number of its chain.
        title: Of the cell.
        failure: Why it failed; empty where it did not.
        verdict: Of its healing; empty where it failed.
    """

    chain: int
    title: str
    failure: str
    verdict: str


@dataclass(frozen=True)
class Seen:
    """What is new.

    Attributes:
        now: Chain → what its worker is doing.
        ended: Cells that ended since the last look.
        died: Chain → how many of its workers died so far, where any did.
        said: Warnings since the last look.
    """

    now: dict[int, Now] = field(default_factory=dict)
    ended: list[Ended] = field(default_factory=list)
    died: dict[int, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)


class Board:
    """Counts tries, and holds the last word of every worker. What is said twice counts once: an
    answer may be lost on its way.
    """

    def __init__(self) -> None:
        self._entered: defaultdict[int, set[str]] = defaultdict(set)
        self._tries: defaultdict[Place, list[_Try]] = defaultdict(list)
        self._folders: set[str] = set()
        self._over: set[Place] = set()
        self._now: dict[int, Now] = {}
        self._ended: list[Ended] = []
        self._said: list[str] = []
        self._signum: int | None = None

    def enters(self, chain: int, worker: str) -> int:
        """A worker takes a chain up; how many did so, this one included."""
        self._entered[chain].add(worker)
        return len(self._entered[chain])

    def begins(self, place: Place, worker: str, now: Now) -> tuple[int, int]:
        """A cell begins; the number of this try, and of how many in a row, with this, none went on
        further than the one before. Where machines are taken away while a cell comes further and
        further, that is no failure of the cell. One that was over before is found again, and is not
        tried.
        """
        self._now[place[0]] = now
        tries = self._tries[place]
        if place not in self._over and worker not in {one.worker for one in tries}:
            tries.append(_Try(worker))
        best, vain = (0, 0), 0
        for one in tries:
            vain = 1 if one.since > best else vain + 1
            best = max(best, one.since)
        return len(tries), vain

    def goes_on(self, place: Place, since: Point) -> None:
        """Where the newest try of a cell goes on: from what the tries before left."""
        if tries := self._tries.get(place):
            tries[-1].since = max(tries[-1].since, since)

    def tell(self, chain: int, now: Now) -> int | None:
        """How far a cell is; the answer is the signal by which it is to end, if it is."""
        self._now[chain] = now
        return self._signum

    def ended(self, place: Place, ended: Ended) -> None:
        """A cell is over; said once, however often it is found again."""
        if place not in self._over:
            self._over.add(place)
            self._ended.append(ended)

    def say(self, text: str) -> None:
        """A warning."""
        self._said.append(text)

    def leaves(self, chain: int, folder: str = "") -> None:
        """A worker is through with a chain, whose folder is of no use on any machine then."""
        self._now.pop(chain, None)
        self._folders |= {folder} - {""}

    def done_with(self) -> set[str]:
        """Names of the folders that are of no use any more."""
        return self._folders

    def read(self) -> Seen:
        """What is new; cells that ended, and warnings, are told once."""
        ended, self._ended = self._ended, []
        said, self._said = self._said, []
        died = {chain: len(them) - 1 for chain, them in self._entered.items() if len(them) > 1}
        return Seen(dict(self._now), ended, died, said)

    def stop(self, signum: int) -> None:
        """Every worker is to end at its next safe point."""
        self._signum = signum
