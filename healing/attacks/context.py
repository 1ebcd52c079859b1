"""What an arm is made from: model, text, healthy weights, and what is found out about them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from healing.attacks.alignment import AlignmentBaselines, random_sequences, sequence_loss
from healing.attacks.base import Arm, Preparation
from healing.attacks.catalyst_search import Catalyst
from healing.attacks.clean_hessian import LARGE, clean_hessian, hessian_subspace
from healing.attacks.finished import Finished
from healing.attacks.objective import ObjectiveArm
from healing.attacks.weight_change import WeightChange
from healing.config.attack import ALWAYS, NEVER, AttackConfig
from healing.curvature.basis_cache import kept_bases
from healing.curvature.hessian import HessianOperator
from healing.curvature.subspaces import LowCurvatureSubspace
from healing.data.splits import Corpus
from healing.data.windows import batches
from healing.models.blocks import block_matrices
from healing.models.loading import LoadedModel
from healing.randomness import named_generator
from healing.registry import ARMS

PAIRS = "leading directions"
"""Part that holds what Lanczos found: k vectors of the model's size, which are kept of models below
:data:`healing.attacks.clean_hessian.LARGE` alone.
"""


@dataclass(frozen=True)
class AttackContext:
    """What the file of an arm is given.

    Attributes:
        config: Resolved configuration.
        loaded: The healthy model with its tokenizer and device.
        corpus: Clean text; attacks read the split ``attack``.
        change: Snapshot of the healthy weights.
        curvature_metrics: Curvature at the healthy weights: filled while the arm is made.
        solver_statuses: How the iterations behind these numbers ended.
        finished: Results of parts that took long: an attack that is cut takes them from there.
    """

    config: AttackConfig
    loaded: LoadedModel
    corpus: Corpus
    change: WeightChange
    curvature_metrics: dict[str, float] = field(default_factory=dict)
    solver_statuses: dict[str, str] = field(default_factory=dict)
    finished: Finished = field(default_factory=Finished)

    @property
    def model(self) -> PreTrainedModel:
        """The healthy model itself."""
        return self.loaded.model

    def generator(self, purpose: str) -> torch.Generator:
        """A random stream that all arms of a seed share."""
        return named_generator(self.config.seed, purpose)

    def draws(self, purpose: str = "") -> torch.Generator:
        """A random stream of the attack: the arm's own, or the one named."""
        return named_generator(self.config.seed, "attack", purpose or self.config.arm)

    @functools.cached_property
    def _texts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows of the attack split, int64 (windows, catalyst_length), and a random order."""
        windows = self.corpus.windows("attack", self.loaded.tokenizer, self.config.catalyst_length)
        order = torch.randperm(len(windows), generator=self.generator("text"))
        return windows.to(self.loaded.device), order

    def text(self, number: int) -> torch.Tensor:
        """A window of clean text, int64 (catalyst_length,); number 0 is the baseline's."""
        windows, order = self._texts
        return windows[order[number]]

    @functools.cached_property
    def hessian(self) -> HessianOperator:
        """Hessian of the clean loss at the healthy weights."""
        return clean_hessian(self.config, self.loaded, self.corpus)

    @functools.cached_property
    def subspace(self) -> LowCurvatureSubspace:
        """The low-curvature subspace N of the healthy weights."""
        config = self.config
        if config.subspace == "singular":
            return kept_bases(
                block_matrices(self.model),
                config.subspace_energy,
                self.loaded.digest,
                config.cache_dir,
            )
        found = hessian_subspace(
            self.hessian,
            self.model,
            config.hessian_directions,
            self.generator("lanczos"),
            self.finished.get(PAIRS),
        )
        if self.hessian.shape[0] < LARGE and self.finished.get(PAIRS) is None:
            self.finished.keep(PAIRS, found.pairs)
        self.curvature_metrics.update(found.metrics())
        self.solver_statuses["hessian_status"] = found.status
        return found.subspace

    @functools.cached_property
    def baselines(self) -> AlignmentBaselines:
        """What a gradient's alignment with N is compared with."""
        config, loaded = self.config, self.loaded
        draws = self.generator("baseline")
        random = random_sequences(
            config.baseline_draws, config.catalyst_length, loaded.vocabulary, draws, loaded.opening
        )
        return AlignmentBaselines(self.subspace, random.to(loaded.device), self.text(0))

    def measured_baselines(self, *, by_default: bool = False) -> AlignmentBaselines | None:
        """:attr:`baselines` where ρ is to be measured along the attack, else ``None``: the subspace
        of a large model takes long, and arms that have nothing to do with it need none.

        Args:
            by_default: Whether ``alignment`` ``by_arm`` asks for it.
        """
        wanted = {ALWAYS: True, NEVER: False}.get(self.config.alignment, by_default)
        return self.baselines if wanted else None

    def sequence_arm(
        self, tokens: torch.Tensor, *, projected: bool = False, catalyst: Catalyst | None = None
    ) -> ObjectiveArm:
        """Descent on the loss of one sequence of tokens.

        Args:
            tokens: int64 (length,), on the model's device.
            projected: Whether the optimiser is given P_N of the gradient instead of the gradient.
            catalyst: The search that the tokens come from.
        """

        def objective() -> torch.Tensor:
            return sequence_loss(self.model, tokens)

        return ObjectiveArm(
            self.model,
            objective,
            objective,
            self.measured_baselines(by_default=True),
            self.change,
            projection=self.subspace if projected else None,
            catalyst=catalyst,
        )


def prepare_arm(
    config: AttackConfig,
    loaded: LoadedModel,
    corpus: Corpus,
    change: WeightChange,
    finished: Finished | None = None,
) -> Preparation:
    """The arm that the configuration names, ready to run.

    Args:
        config: Resolved configuration.
        loaded: The healthy model.
        corpus: Clean text.
        change: Snapshot of the healthy weights.
        finished: Where results of parts are taken from and kept.

    Raises:
        ConfigError: There is no such arm, or its plug-in cannot be used.
        CorpusError: The attack split is too small.
        CheckpointError: The reference of matched noise cannot be used.
    """
    context = AttackContext(config, loaded, corpus, change, finished=finished or Finished())
    arm: Arm = ARMS.load(config.arm).make(context)
    return Preparation(arm, context.curvature_metrics, context.solver_statuses)


def warmup_batches(
    config: AttackConfig, loaded: LoadedModel, corpus: Corpus
) -> Iterator[torch.Tensor]:
    """``warmup_steps`` batches of clean text (windows, tokens) from the attack split.

    Raises:
        CorpusError: The attack split is too small.
    """
    if config.warmup_steps:
        windows = corpus.windows("attack", loaded.tokenizer, config.sequence_length)
        draws = named_generator(config.seed, "warmup")
        stream = batches(windows, int(config.batch_size), draws)
        for batch in itertools.islice(stream, config.warmup_steps):
            yield batch.to(loaded.device)
