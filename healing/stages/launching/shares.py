"""What a chain asks of a cluster: CPUs, GPUs and memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from healing.config.arm_tags import arm_needs
from healing.config.options import AUTO
from healing.config.presets import preset_for
from healing.config.sweep import SweepConfig
from healing.registry import ARMS, SHAM
from healing.stages.launching.chain import Chain
from healing.stages.launching.chain_run import predicted_bytes

CPU = "cpu"


@dataclass(frozen=True)
class Machine:
    """What one machine of a cluster has.

    Attributes:
        address: Of the machine.
        cpus: That may be asked for.
        gpus: Likewise.
        memory: Likewise, bytes.
        node: Ray's id of it.
        host: Its name.
    """

    address: str
    cpus: float
    gpus: float
    memory: float = math.inf
    node: str = ""
    host: str = ""

    def has(self, share: Share) -> bool:
        """Whether it is large enough."""
        enough = self.cpus >= share.cpus and self.gpus >= share.gpus
        return enough and self.memory >= share.memory


@dataclass(frozen=True)
class Share:
    """What one chain takes while it runs.

    Attributes:
        cpus: CPUs.
        gpus: GPUs, or a part of one.
        memory: Bytes of main memory; 0 = any.
    """

    cpus: int
    gpus: float
    memory: int

    def __str__(self) -> str:
        words = [f"{self.cpus} CPU(s)"]
        words += [f"{self.gpus:g} GPU(s)"] if self.gpus else []
        words += [f"{self.memory / 1e9:.2f} GB"] if self.memory else []
        return ", ".join(words)


def share_of(chain: Chain, machines: Sequence[Machine]) -> Share:
    """As the configuration says; what it leaves open follows from model, device and machines."""
    config = chain.config
    gpus = _gpus(config, machines)
    cpus = config.worker_cpus
    if cpus == AUTO:
        most = [int(machine.cpus) for machine in machines if machine.cpus >= 1]
        single = gpus or preset_for(chain.cells[0].model).threads == 1
        cpus = 1 if single else min(most, default=1)
    memory = config.worker_memory
    if memory == AUTO:
        memory = 0 if gpus else predicted_peak(chain) / 1e9
    return Share(int(cpus), gpus, int(float(memory) * 1e9))


def _gpus(config: SweepConfig, machines: Sequence[Machine]) -> float:
    if config.worker_gpus != AUTO:
        return float(config.worker_gpus)
    has_any = any(machine.gpus for machine in machines)
    return float(config.device == "cuda" or (config.device == AUTO and has_any))


def predicted_peak(chain: Chain) -> int:
    """Bytes that the chain's largest cell takes at its peak on the CPU, as far as that is
    predicted: of arms that refer to no other and are no plug-in's, without landscapes; 0 where
    there is none.
    """
    peaks = [0]
    for cell in chain.cells:
        if cell.role == SHAM or arm_needs(cell.arm) or not ARMS.facts(cell.arm).built_in:
            continue
        below = chain.below(chain.config.output_dir, device=CPU)
        peaks.append(predicted_bytes(below, cell))
    return max(peaks)


def shares_of(chains: Sequence[Chain], machines: Sequence[Machine]) -> list[Share]:
    """One for every chain; those of one model are alike."""
    known: dict[str, Share] = {}
    found = []
    for chain in chains:
        label = chain.cells[0].label
        if label not in known:
            known[label] = share_of(chain, machines)
        found.append(known[label])
    return found
