"""States whose answer is known: bowls, slopes, saddles, double wells, tables of bigrams."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from healing.curvature.escape import Direction, escape
from healing.curvature.flat_weights import weights_of
from healing.curvature.gradient_noise import gradient_statistics
from healing.curvature.hessian import HessianOperator
from healing.curvature.lanczos import lanczos
from healing.curvature.minimum import FLAT, NO, UNDETERMINED, YES, Curvature, Evidence, is_minimum
from healing.randomness import named_generator

Loss = Callable[[nn.Module, Tensor], Tensor]


def examine(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Tensor],
    heldout: Callable[[], Tensor],
    iterations: int = 60,
) -> Evidence:
    """Evidence about a state from a loss and its batches: the first is the curvature's."""
    each = [HessianOperator(model, loss, [batch], [1]) for batch in batches]
    found = lanczos(each[0], named_generator(0, "lanczos"), max_iterations=iterations)
    curvature = Curvature(
        tuple(found.largest.values.tolist()),
        tuple(found.smallest.values.tolist()),
        tuple(found.largest.residuals.tolist()),
        tuple(found.smallest.residuals.tolist()),
        found.status.value,
        found.products,
    )
    lowest = None
    if curvature.is_negative:
        lowest = Direction(curvature.smallest[0], found.smallest.vectors[:, 0])
    left = escape(
        model,
        lambda: float(loss(model, batches[0]).detach()),
        heldout,
        lambda step: each[step % len(each)].gradient(),
        named_generator(0, "escape"),
        step_size=1 / curvature.steepness,
        steps=10,
        radius=1e-3,
        perturbations=2,
        lowest=lowest,
    )
    return Evidence(gradient_statistics([one.gradient() for one in each]), curvature, left)


class Weights(nn.Module):
    """A point, as a weight vector and a bias."""

    def __init__(self, weight: Tensor, bias: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.tensor([bias]))


def answer_on(
    shape: Callable[[Tensor], Tensor], at: Tensor, noise: float = 1e-3, **options
) -> tuple[str, str]:
    """Answer at `at` (last entry the bias), of the loss shape(w) + ε·w with ε ~ N(0, noise²) in
    each of 12 batches and each of 32 held-out windows.
    """
    model = Weights(at[:-1].clone(), float(at[-1]))
    slopes = noise * torch.randn(44, len(at), generator=named_generator(7, "noise"))
    # A batch is as good as many windows, and its slope is about 0 at the state.
    batches = list((slopes[:12] - slopes[:12].mean(0)) / 10)
    windows = slopes[12:] - slopes[12:].mean(0)

    def loss(model: nn.Module, slope: Tensor) -> Tensor:
        w = torch.cat([model.weight, model.bias])
        return 3.0 + shape(w) + slope @ w

    def heldout() -> Tensor:
        w = weights_of(model)
        return (3.0 + shape(w) + windows @ w).double()

    found = is_minimum(examine(model, loss, batches, heldout, **options))
    return found.answer, found.because


def draw(n: int) -> Tensor:
    return torch.randn(n, generator=named_generator(1, "centre"))


def bowl(curvatures: Tensor, centre: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda w: 0.5 * (curvatures * (w - centre) ** 2).sum()


@pytest.mark.parametrize("distance", [0.0, 1e-9, 1e-7])
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_the_minimum_of_a_bowl(distance, noise):
    """Reached to 1e-9, with batches that agree (no sampling error at all) and that do not."""
    centre = draw(40)
    curvatures = torch.linspace(0.5, 10.0, 40)
    at = (centre.double() + distance / math.sqrt(40)).float()
    assert answer_on(bowl(curvatures, centre), at, noise)[0] == YES


@pytest.mark.parametrize(("gain", "answer"), [(1.5e-4, FLAT), (2e-3, FLAT), (0.05, NO)])
def test_a_slope_counts_by_what_it_is_worth(gain, answer):
    """Displaced along the steepest direction, where one step takes all that there is to gain."""
    centre = draw(40)
    curvatures = torch.linspace(0.5, 10.0, 40)
    at = centre.clone()
    at[-1] += math.sqrt(2 * gain / 10.0)
    found, because = answer_on(bowl(curvatures, centre), at)
    assert found == answer
    assert ("the gradient is not zero" if answer == FLAT else "gains at least") in because


def test_a_slope_worth_a_little_is_not_called_a_descent_by_more_batches():
    """What was "no" with enough batches: a significant gradient worth 1e-5 nats."""
    centre = draw(40)
    at = centre.clone()
    at[0] += math.sqrt(2e-5 / 10.0)
    found, because = answer_on(bowl(torch.full((40,), 10.0), centre), at, noise=0.0)
    assert (found, because.split(",")[0]) == (FLAT, "the gradient is not zero")


@pytest.mark.parametrize("count", [1, 50, 200])
def test_saddles_behind_a_steep_direction(count):
    """Curvature -9 in some of 400 directions, λ_max = 1e4: a thousandth of it is more than 9."""
    curvatures = torch.linspace(20.0, 100.0, 400)
    curvatures[:count], curvatures[-1] = -9.0, 1e4
    centre = draw(400)
    # 100 products: one direction in 400 among many of like size takes that long to find.
    found, because = answer_on(bowl(curvatures, centre), centre, iterations=100)
    assert found == NO
    assert because.startswith("a direction of negative curvature exists, and descent beside")


def test_a_maximum():
    centre = draw(10)
    assert answer_on(bowl(-torch.linspace(1.0, 3.0, 10), centre), centre)[0] == NO


def double_well(depth: float, centre: Tensor) -> Callable[[Tensor], Tensor]:
    """-x²/2 + x⁴/(16·depth) beside a bowl: curvature -1 at x = 0, wells `depth` deep beside it."""

    def shape(w: Tensor) -> Tensor:
        x = w[4] - centre[4]
        rest = torch.cat([w[:4] - centre[:4], w[5:] - centre[5:]])
        return 2.0 * (rest**2).sum() - x**2 / 2 + x**4 / (16 * depth)

    return shape


@pytest.mark.parametrize(("depth", "answer"), [(0.001, FLAT), (0.05, NO)])
def test_a_double_well_counts_by_its_depth(depth, answer):
    centre = draw(30)
    found, because = answer_on(double_well(depth, centre), centre)
    assert found == answer
    assert "a direction of negative curvature exists" in because


def test_a_saddle_in_a_bias_that_is_zero():
    """Random perturbations see it too, without any knowledge of the curvature."""
    model = Weights(draw(20), 0.0)
    centre = weights_of(model)
    curvatures = torch.full((21,), 2.0)
    curvatures[-1] = -2.0
    shape = bowl(curvatures, centre)
    assert answer_on(shape, centre)[0] == NO

    def loss() -> float:
        return float(shape(weights_of(model)))

    def gradient(_step: int) -> Tensor:
        return curvatures * (weights_of(model) - centre)

    left = escape(
        model, loss, lambda: torch.full((8,), loss(), dtype=torch.float64), gradient,
        named_generator(0, "escape"), step_size=0.5, steps=20, radius=1e-3, perturbations=3,
    )  # fmt: skip
    assert left.escaped == 3


def test_a_lowest_eigenvalue_that_is_not_found_leaves_the_question_open():
    """All curvatures are positive, but three products cannot know."""
    centre = draw(400)
    found, because = answer_on(bowl(torch.logspace(-1, 2, 400), centre), centre, iterations=3)
    assert found == UNDETERMINED
    assert because.startswith("the lowest eigenvalue is not known well enough (it may be -")


def test_a_lowest_eigenvalue_that_is_known_to_be_worth_nothing_is_known_well_enough():
    """Forty directions without any curvature: no iteration says 0 exactly."""
    curvatures = torch.linspace(0.1, 10.0, 100)
    curvatures[:40] = 0.0
    assert answer_on(bowl(curvatures, draw(100)), draw(100), noise=0.0)[0] == YES


def test_a_held_out_loss_that_is_not_known_leaves_the_question_open():
    """Wells 0.03 nats deep, and windows whose own slopes change their losses by more than that."""
    centre = draw(30)
    found, because = answer_on(double_well(0.03, centre), centre, noise=0.5)
    assert found == UNDETERMINED
    assert because.startswith("the held-out loss is not known well enough (a descent lowers it by")


# --- bigrams: P(next token | token) in a table of logits; log P itself is the exact minimum


class Bigrams(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits)


def bigram_loss(model: nn.Module, counts: Tensor) -> Tensor:
    """Mean cross entropy of pairs that occur `counts` (…, tokens, tokens) times, (…,)."""
    losses = -counts * torch.log_softmax(model.table, 1)
    return losses.sum((-2, -1)) / counts.sum((-2, -1))


def sample(chain: Tensor, windows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Counts of the pairs in windows with uniform first tokens, (windows, tokens, tokens)."""
    size = len(chain)
    first = torch.randint(size, (windows, tokens), generator=generator)
    below = chain.cumsum(1)[first, :-1]
    second = (torch.rand(*first.shape, 1, generator=generator) > below).sum(-1)
    counts = torch.zeros(windows, size * size)
    return counts.scatter_add_(1, first * size + second, torch.ones(first.shape)).view(
        windows, size, size
    )


def bigram_answer(seed: int, tokens: int, change: Callable[[Tensor], Tensor]) -> tuple[str, str]:
    generator = named_generator(seed, "bigrams")
    chain = torch.softmax(1.5 * torch.randn(16, 16, generator=generator), 1)
    model = Bigrams(change(chain.log()))
    batches = list(sample(chain, 12, tokens, generator))
    probe = sample(chain, 64, 64, generator)

    @torch.no_grad()
    def heldout() -> Tensor:
        return bigram_loss(model, probe).double()

    found = is_minimum(examine(model, bigram_loss, batches, heldout, 120))
    return found.answer, found.because


@pytest.mark.parametrize("tokens", [1024, 8192, 65536])
def test_the_true_minimum_of_a_sampled_loss(tokens):
    """Every batch has its own minimum elsewhere, and descent into it raises the held-out loss."""
    answers = [bigram_answer(seed, tokens, lambda logits: logits) for seed in range(4)]
    assert [answer for answer, _ in answers] == [YES] * 4, answers


@pytest.mark.parametrize("tokens", [1024, 16384])
def test_tables_that_are_not_the_minimum(tokens):
    flattened = [bigram_answer(seed, tokens, lambda logits: 0.3 * logits) for seed in range(3)]
    assert [answer for answer, _ in flattened] == [NO] * 3, flattened


def test_descent_on_one_batch_fits_that_batch():
    """Why the held-out loss decides: the batch's falls by what the held-out loss rises by."""
    generator = named_generator(0, "overfit")
    chain = torch.softmax(1.5 * torch.randn(32, 32, generator=generator), 1)
    model = Bigrams(chain.log())
    batch, probe = sample(chain, 1, 512, generator)[0], sample(chain, 128, 64, generator)
    operator = HessianOperator(model, bigram_loss, [batch], [1])
    left = escape(
        model,
        lambda: float(bigram_loss(model, batch).detach()),
        lambda: bigram_loss(model, probe).detach().double(),
        lambda _step: operator.gradient(),
        named_generator(0, "escape"),
        step_size=1 / 0.1, steps=20, radius=1e-3, perturbations=2,
    )  # fmt: skip
    assert left.loss_drop > 0.1
    assert left.heldout_loss_drop < -0.02
    assert left.escaped == 0
