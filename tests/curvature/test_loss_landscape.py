"""Gradients, paths, distances and escape against closed forms, brute force and toy losses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from healing.curvature.escape import Descent, Direction, Escape, escape, perturbation
from healing.curvature.flat_weights import put_weights, restoring_weights, weights_of
from healing.curvature.gradient_noise import gradient_statistics
from healing.curvature.loss_landscape import LossPath, displacement, loss_path
from healing.measurements.probe import Probe
from healing.randomness import named_generator


class Point(nn.Module):
    """A point in space whose coordinates are spread over two tensors."""

    def __init__(self, *coordinates: float) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([coordinates[0]]))
        self.rest = nn.Parameter(torch.tensor(coordinates[1:]))


def closures(model: nn.Module, function):
    """Loss and gradient of `function(vector)` at the model's weights."""

    def loss() -> float:
        return float(function(weights_of(model)))

    def gradient() -> Tensor:
        at = weights_of(model).requires_grad_(True)
        (found,) = torch.autograd.grad(function(at), at)
        return found

    return loss, gradient


def brute_force(gradients: list[Tensor]) -> tuple[float, float]:
    """Mean of gᵢ·gⱼ over i ≠ j by two loops, and its jackknife by leaving each batch out."""

    def pairs(kept: list[Tensor]) -> float:
        products = [
            float(a.double() @ b.double())
            for i, a in enumerate(kept)
            for j, b in enumerate(kept)
            if i != j
        ]
        return sum(products) / len(products)

    count = len(gradients)
    left_out = [pairs(gradients[:i] + gradients[i + 1 :]) for i in range(count)]
    mean = sum(left_out) / count
    variance = (count - 1) / count * sum((value - mean) ** 2 for value in left_out)
    return pairs(gradients), math.sqrt(variance)


def test_gradient_statistics_are_those_of_brute_force(monkeypatch):
    monkeypatch.setattr("healing.curvature.gradient_noise._COLUMNS_PER_BLOCK", 7)
    generator = named_generator(3, "gradients")
    gradients = list(0.3 + torch.randn(9, 40, generator=generator))
    found = gradient_statistics(gradients)
    squared, error = brute_force(gradients)
    assert found.squared_norm == pytest.approx(squared, rel=1e-9)
    assert found.standard_error == pytest.approx(error, rel=1e-9)
    stacked = torch.stack(gradients).double()
    assert found.norm == pytest.approx(float(stacked.mean(0).norm()), rel=1e-9)
    # Squared standard error of the mean, summed over coordinates.
    noise = float(stacked.var(0).sum()) / 9
    assert found.noise == pytest.approx(noise, rel=1e-9)
    assert found.snr == pytest.approx(squared / noise, rel=1e-9)


def test_signal_to_noise_of_a_known_gradient():
    """G of norm 2, unit noise in 500 dimensions, 20 batches: E‖G‖² = 4, noise = 500/20."""
    generator = named_generator(0, "known")
    truth = torch.zeros(500)
    truth[7] = 2.0
    draws = [
        gradient_statistics([truth + torch.randn(500, generator=generator) for _ in range(20)])
        for _ in range(200)
    ]
    mean = sum(d.squared_norm for d in draws) / len(draws)
    assert mean == pytest.approx(4.0, abs=0.5)  # standard deviation of the mean about 0.15
    assert sum(d.noise for d in draws) / len(draws) == pytest.approx(25.0, rel=0.02)
    # The naive ‖ḡ‖² would say 29.
    assert sum(d.norm**2 for d in draws) / len(draws) == pytest.approx(29.0, rel=0.05)


def test_a_zero_gradient_is_rarely_called_significant():
    """The rule "above 3 standard errors" under G = 0, 12 batches, flat and steep noise spectra."""
    generator = named_generator(1, "null")
    for scales in (torch.ones(300), 1 / torch.arange(1.0, 301.0)):
        false = 0
        for _ in range(400):
            batches = list(scales * torch.randn(12, 300, generator=generator))
            found = gradient_statistics(batches)
            false += found.squared_norm > 3 * found.standard_error
        assert false / 400 <= 0.02  # nominal 0.6 % for a t distribution with 11 degrees of freedom


def test_identical_batches_have_no_noise():
    found = gradient_statistics([torch.tensor([3.0, 4.0])] * 4)
    assert (found.norm, found.squared_norm, found.standard_error) == (5.0, 25.0, 0.0)
    assert found.snr == math.inf
    assert math.isnan(gradient_statistics([torch.zeros(2)] * 4).snr)


def test_a_gradient_that_is_not_finite_gives_nan():
    found = gradient_statistics([torch.tensor([1.0, math.nan]), torch.ones(2), torch.ones(2)])
    assert not found.finite
    assert math.isnan(found.snr)


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match="at least three batches, got 2"):
        gradient_statistics([torch.ones(2)] * 2)


def test_a_quadratic_has_no_barrier_and_its_closed_form():
    curvature = torch.tensor([1.0, 10.0, 0.5])
    model = Point(0.0, 0.0, 0.0)
    start, end = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-4.0, 1.0, 0.0])
    loss, _ = closures(model, lambda w: 0.5 * (curvature * w**2).sum())
    path = loss_path(model, start, end, 21, loss)
    assert path.barrier == 0
    assert math.isnan(path.barrier_position)
    # Below the chord by α(1-α)/2·(end-start)ᵀH(end-start).
    bend = float((curvature * (end - start) ** 2).sum()) / 2
    expected = [-a * (1 - a) * bend for a in path.positions]
    assert list(path.excess) == pytest.approx(expected, abs=1e-4)


def test_a_double_well_has_the_barrier_of_its_closed_form():
    """L = (x² - 1)² + x/10 from -1 to 1: the chord is x/10, so the excess is (x² - 1)², 1 at 0."""
    model = Point(5.0, 7.0)
    loss, _ = closures(model, lambda w: (w[0] ** 2 - 1) ** 2 + w[0] / 10)
    path = loss_path(model, torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 2.0]), 21, loss)
    assert path.barrier == pytest.approx(1.0, abs=1e-6)
    assert path.barrier_position == 0.5
    assert path.climb == pytest.approx(1.1, abs=1e-6)  # from -0.1 up to 1 at x = 0
    assert path.positions[13] == pytest.approx(0.65)
    assert path.excess[13] == pytest.approx((0.3**2 - 1) ** 2, abs=1e-6)


def test_a_concave_descent_has_a_barrier_and_nothing_to_climb():
    path = LossPath((0.0, 0.5, 1.0), (4.0, 3.5, 1.0))
    assert path.barrier == 1.0
    assert path.climb == 0.0


def test_weights_come_back_bitwise_also_after_an_error(nano, probe):
    before = {k: v.clone() for k, v in nano.model.state_dict().items()}
    start = weights_of(nano.model)
    seen = []

    def loss() -> float:
        seen.append(weights_of(nano.model))
        return probe.loss(nano.model)

    loss_path(nano.model, start, start * 0.5, 5, loss)
    assert all(torch.equal(v, before[k]) for k, v in nano.model.state_dict().items())
    assert torch.equal(seen[0], start)
    assert torch.equal(seen[-1], start * 0.5)
    assert torch.equal(seen[2], start * 0.75)
    with pytest.raises(ValueError, match="expected shape"), restoring_weights(nano.model):
        put_weights(nano.model, torch.cat([start * 3, start]))
    with pytest.raises(ZeroDivisionError):
        loss_path(nano.model, start, start * 0.5, 5, lambda: 1 / 0)
    assert all(torch.equal(v, before[k]) for k, v in nano.model.state_dict().items())


def test_points_between_are_rounded_once():
    model = Point(0.0, 0.0)
    start, end = torch.tensor([1.0, 1e-3]), torch.tensor([3.0, 1e8])
    seen = []
    loss_path(model, start, end, 4, lambda: seen.append(weights_of(model)) or 0.0)
    exact = [[(2 * a + b) / 3 for a, b in zip(start.tolist(), end.tolist(), strict=True)]]
    assert torch.equal(seen[1], torch.tensor(exact[0], dtype=torch.float64).float())


def test_a_path_through_a_state_that_cannot_compute_has_a_reason():
    path = LossPath((0.0, 0.5, 1.0), (1.0, math.inf, 2.0))
    assert math.isnan(path.barrier)
    assert math.isnan(path.climb)
    assert path.reason == "the loss is not finite at 50 % of the path"
    model = Point(0.0, 1.0)
    loss, _ = closures(model, lambda w: (w**2).sum())
    path = loss_path(model, torch.zeros(2), torch.tensor([math.inf, 0.0]), 3, loss)
    assert path.losses[0] == 0.0  # 0·∞ must not spoil the start
    assert not path.finite


def test_bad_paths_and_vectors_are_refused():
    model = Point(0.0, 1.0)
    with pytest.raises(ValueError, match="at least three points, got 2"):
        loss_path(model, torch.zeros(2), torch.zeros(2), 2, lambda: 0.0)
    with pytest.raises(ValueError, match=r"expected shape \(2,\), got \(3,\)"):
        put_weights(model, torch.zeros(3))


def test_return_cosine_by_hand():
    healthy, collapsed = torch.tensor([0.0, 3.0]), torch.tensor([4.0, 3.0])
    straight = displacement(healthy, collapsed, torch.tensor([1.0, 3.0]))
    assert straight.return_cosine == 1.0
    assert straight.return_share == 0.75
    assert (straight.attack_norm, straight.healing_norm, straight.remaining_norm) == (4, 3, 1)
    assert straight.healthy_norm == 3
    sideways = displacement(healthy, collapsed, torch.tensor([4.0, 5.0]))
    assert sideways.return_cosine == pytest.approx(0.0, abs=1e-15)
    diagonal = displacement(healthy, collapsed, torch.tensor([1.0, 7.0]))
    assert diagonal.return_cosine == pytest.approx(3 / 5)
    assert diagonal.remaining_norm == pytest.approx(math.sqrt(17))
    onwards = displacement(healthy, collapsed, torch.tensor([8.0, 3.0]))
    assert onwards.return_cosine == -1.0


def test_an_undefined_angle_has_its_reason():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for states, reason in (
        ((a, a, b), "the collapsed state is the healthy one"),
        ((a, b, b), "the healed state is the collapsed one"),
        ((a, b, a * math.nan), "the weights of a state are not finite"),
    ):
        found = displacement(*states)
        assert math.isnan(found.return_cosine)
        assert found.reason == reason
    assert math.isnan(displacement(a, a, b).return_share)


def test_perturbation_moves_every_tensor_by_its_own_share(nano):
    drawn = perturbation(nano.model, 1e-3, named_generator(0, "p"))
    sizes = [p.numel() for p in nano.model.parameters()]
    for parameter, part in zip(nano.model.parameters(), drawn.split(sizes), strict=True):
        alike = [p.detach() for p in nano.model.parameters() if p.ndim == parameter.ndim]
        rms = float(torch.cat([p.flatten() for p in alike]).square().mean().sqrt())
        own = float(parameter.detach().square().mean().sqrt())
        size = max(own, 0.1 * rms) * math.sqrt(parameter.numel())
        assert float(part.norm()) == pytest.approx(1e-3 * size, rel=1e-4)
    assert float(drawn.norm()) == pytest.approx(1e-3 * float(weights_of(nano.model).norm()), 1e-2)


class Adapter(nn.Module):
    """Matrices of root mean square 2 and 0, a gain of 3, a bias of 0, a scalar of 0."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((4, 5), 2.0 * scale))
        self.b = nn.Parameter(torch.zeros(5, 12))
        self.gain = nn.Parameter(torch.full((8,), 3.0 * scale))
        self.bias = nn.Parameter(torch.zeros(8))
        self.scalar = nn.Parameter(torch.zeros(()))


def test_tensors_that_are_zero_are_perturbed_too():
    model = Adapter()
    sizes = [p.numel() for p in model.parameters()]
    parts = perturbation(model, 1.0, named_generator(0, "p")).split(sizes)
    norms = [float(part.norm()) for part in parts]
    matrices = math.sqrt(4 * 20 / 80)  # 20 entries of 2, 60 of 0
    vectors = math.sqrt(9 * 8 / 16)
    everything = math.sqrt((4 * 20 + 9 * 8) / 97)  # no other tensor has no axes
    expected = [
        2 * math.sqrt(20),
        0.1 * matrices * math.sqrt(60),
        3 * math.sqrt(8),
        0.1 * vectors * math.sqrt(8),
        0.1 * everything,
    ]
    assert norms == pytest.approx(expected, rel=1e-5)
    nothing = perturbation(Adapter(0.0), 1.0, named_generator(0, "p"))
    assert float(nothing.norm()) == pytest.approx(0.1 * math.sqrt(97), rel=1e-5)


def follow(
    model: nn.Module, function, step_size: float, steps: int = 40, lowest: Direction | None = None
) -> Escape:
    """Ten held-out windows whose losses are 1, 2 … 10 times the loss that is descended."""
    loss, gradient = closures(model, function)
    return escape(
        model, loss, lambda: loss() * torch.arange(1.0, 11.0, dtype=torch.float64),
        lambda _step: gradient(), named_generator(0, "escape"),
        step_size=step_size, steps=steps, radius=1e-2, perturbations=3, lowest=lowest,
    )  # fmt: skip


def test_descent_returns_to_a_convex_minimum():
    target, curvature = torch.tensor([1.0, 2.0, -1.0]), torch.tensor([1.0, 4.0, 2.0])
    model = Point(*target.tolist())
    found = follow(model, lambda w: 0.5 * (curvature * (w - target) ** 2).sum(), 1 / 4)
    assert found.escaped == 0
    assert found.finite
    assert found.distance_ratio < 1e-3  # the slowest direction shrinks by (3/4)^40 = 1e-5
    assert found.loss_drop == pytest.approx(0.0, abs=1e-8)
    assert found.unperturbed.final_distance == 0.0
    assert torch.equal(weights_of(model), target)


def test_descent_leaves_a_saddle():
    """Curvatures 2 and -1, step 1/2: the unstable component grows by 1.5 per step."""
    centre = torch.tensor([1.0, 1.0])
    slopes = torch.tensor([2.0, -1.0])
    model = Point(1.0, 1.0)
    found = follow(model, lambda w: 0.5 * (slopes * (w - centre) ** 2).sum(), 1 / 2, steps=20)
    assert found.escaped == 3
    # Every tensor is one number of norm 1 here: the perturbation is 0.01 along each axis.
    assert found.perturbed[0].initial_distance == pytest.approx(0.01 * math.sqrt(2), rel=1e-4)
    assert found.perturbed[0].final_distance == pytest.approx(0.01 * 1.5**20, rel=1e-2)
    assert found.loss_drop == pytest.approx(0.5 * (0.01 * 1.5**20) ** 2, rel=2e-2)
    assert found.heldout_loss_drop == pytest.approx(5.5 * found.loss_drop)
    first = found.perturbed[0]
    spread = math.sqrt(sum((k - 5.5) ** 2 for k in range(1, 11)) / 9 / 10)  # over ten windows
    assert first.heldout_error == pytest.approx(spread * first.loss_drop)
    assert found.unperturbed.final_distance == 0.0  # a stationary point, undisturbed
    assert found.along == ()


def test_descent_along_the_lowest_curvature_doubles_its_distance():
    """Curvatures 1e4 and -1e-2: by steps of 1/λ_max nothing moves, by 1/|λ_min| all does."""
    slopes = torch.tensor([1e4, -1e-2])
    model = Point(3.0, 4.0)
    centre = torch.tensor([3.0, 4.0])
    lowest = Direction(-1e-2, torch.tensor([0.0, 1.0]))
    found = follow(
        model, lambda w: 0.5 * (slopes * (w - centre) ** 2).sum(), 1e-4, steps=8, lowest=lowest
    )
    assert found.weight_norm == 5.0
    assert found.escaped == 0
    assert found.distance_ratio < 1.1
    for side in found.along:
        assert side.initial_distance == pytest.approx(0.01 * 5, rel=1e-4)
        assert side.final_distance == pytest.approx(0.05 * 2**8, rel=1e-4)
        assert side.loss_drop == pytest.approx(0.5 * 1e-2 * (0.05 * 2**8) ** 2, rel=1e-3)
        assert side.escaped
    assert found.best in found.along
    assert torch.equal(weights_of(model), centre)


def test_descent_along_the_lowest_curvature_goes_no_further_than_twice_as_far():
    """A slope that is large beside the curvature: 1/|λ_min| times it would be 1,000 away."""
    model = Point(3.0, 4.0)
    lowest = Direction(-1e-3, torch.tensor([0.0, 1.0]))
    found = follow(model, lambda w: -w[1], 1e-9, steps=3, lowest=lowest)
    distances = sorted(side.final_distance for side in found.along)
    # Up: 0.05, 0.1, 0.2, 0.4. Down: -0.05, 0, 0.05, 0.1, since it may always go 0.05.
    assert distances == pytest.approx([0.1, 0.4], rel=1e-3)


def test_a_lower_heldout_loss_counts_beyond_its_error_and_a_hundredth():
    assert Descent(1.0, 3.0, 0.0, 0.05, 0.01).escaped
    assert not Descent(1.0, 3.0, 5.0, 0.05, 0.02).escaped  # whatever the batch says
    assert not Descent(1.0, 3.0, 0.0, 0.009, 0.0).escaped
    assert not Descent(1.0, 3.0, 0.0, math.nan, 0.0).escaped
    assert not Descent(1.0, 3.0, 0.0, 1.0, math.nan).escaped  # one window has no error


def test_escape_is_not_tried_without_curvature():
    found = follow(Point(1.0, 1.0), lambda w: -(w**2).sum(), math.nan)
    assert found.reason == "no curvature to take the step size from"
    assert math.isnan(found.loss_drop)
    assert not found.finite


def test_escape_from_a_state_that_cannot_compute_is_not_finite():
    found = follow(Point(1.0, math.nan), lambda w: (w**2).sum(), 0.1)
    assert not found.finite
    assert found.escaped == 0


def test_the_probes_loss_alone_is_the_measured_one(nano, probe):
    assert probe.loss(nano.model) == probe.measure(nano.model).loss
    with torch.no_grad():
        next(nano.model.parameters())[0, 0] = math.nan
    assert math.isnan(Probe(probe.windows * 0).loss(nano.model))


def test_the_probes_windows_have_the_losses_of_each_alone(nano, probe):
    apart = [Probe(window[None]).loss(nano.model) for window in probe.windows]
    assert probe.window_losses(nano.model).tolist() == pytest.approx(apart, rel=1e-5)
    assert float(probe.window_losses(nano.model).mean()) == pytest.approx(probe.loss(nano.model))
