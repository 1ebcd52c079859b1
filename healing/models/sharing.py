"""How the ranks of one run share its work: which rows are whose, and how parts become the whole.

A rank is a process of a parallel run; rank 0 is the one that a user started. Everything here is the
identity where there is one rank, so that code that knows of shares computes the same bits alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose parts the ranks have (a ``DTensor``) as one plain tensor on each of them;
    others as they are. All ranks have to ask for it.
    """
    gather = getattr(tensor, "full_tensor", None)
    found: torch.Tensor = tensor if gather is None else gather()
    return found


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, as a plain tensor; all of one that is not spread."""
    local = getattr(tensor, "to_local", None)
    found: torch.Tensor = tensor if local is None else local()
    return found


@dataclass(frozen=True)
class Share:
    """One rank's share.

    Attributes:
        rank: Number of this rank.
        ranks: How many there are.
    """

    rank: int = 0
    ranks: int = 1

    def rows(self, total: int) -> slice:
        """This rank's rows of so many: consecutive, and as many as each other rank's or one more
        or less.
        """
        least, more = divmod(total, self.ranks)
        begin = self.rank * least + min(self.rank, more)
        return slice(begin, begin + least + (self.rank < more))

    def filled(self, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
        """This rank's rows of a tensor, filled up to as many as any rank has by repeating the last
        (all ranks pass the model equally often), and how many of them are its own.
        """
        own = rows[self.rows(len(rows))]
        missing = -(-len(rows) // self.ranks) - len(own)
        filled = torch.cat([own, own[-1:].expand(missing, *own.shape[1:])]) if missing else own
        return filled, len(own)

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks."""
        if self.ranks == 1:
            return part
        found = part.clone()
        distributed.all_reduce(found)
        return found

    def gathered(self, part: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks in their order; how many each has may differ."""
        if self.ranks == 1:
            return part
        counts = torch.zeros(self.ranks, dtype=torch.int64, device=part.device)
        counts[self.rank] = len(part)
        distributed.all_reduce(counts)
        begin = int(counts[: self.rank].sum())
        rows = part.new_zeros(int(counts.sum()), *part.shape[1:])
        rows[begin : begin + len(part)] = part
        distributed.all_reduce(rows)  # nothing but zeros is added to any row
        return rows

    def largest(self, part: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over the ranks; NaN where one has it."""
        return self.gathered(part[None]).amax(0) if self.ranks > 1 else part

    def first(self, value: torch.Tensor) -> torch.Tensor:
        """Rank 0's value, on every rank."""
        if self.ranks == 1:
            return value
        found = value.clone()
        distributed.broadcast(found, 0)
        return found

    def everywhere(self, condition: torch.Tensor) -> bool:
        """Whether something holds on every rank."""
        if self.ranks == 1:
            return bool(condition)
        return int(self.total(condition.long())) == self.ranks


ALONE = Share()
"""Of a process that is the only one."""
