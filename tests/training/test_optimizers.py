"""The optimisers against their published update rules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from healing.randomness import named_generator
from healing.training.optimizers import make_optimizer


def stepped(
    name: str, dtype: torch.dtype = torch.float32, momentum: float = 0.0
) -> tuple[torch.Tensor, ...]:
    """Start, the gradients of three steps, and where they lead at rate 0.01."""
    draw = named_generator(0, "optimiser")
    start = torch.randn(7, generator=draw).to(dtype)
    gradients = [torch.randn(7, generator=draw).to(dtype) for _ in range(3)]
    parameter = nn.Parameter(start.clone())
    optimizer = make_optimizer(name, [parameter], 0.01, momentum)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return start.double(), torch.stack(gradients).double(), parameter.detach().double()


def test_adamw_is_kingma_and_bas_update_without_decay():
    w, gradients, end = stepped("adamw")
    m = v = torch.zeros(7, dtype=torch.float64)
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - 0.01 * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    torch.testing.assert_close(end, w, rtol=1e-5, atol=1e-7)


def test_sgd_has_neither_momentum_nor_decay():
    w, gradients, end = stepped("sgd")
    torch.testing.assert_close(end, w - 0.01 * gradients.sum(0), rtol=1e-5, atol=1e-7)


def test_momentum_is_the_heavy_ball():
    w, gradients, end = stepped("sgd", momentum=0.9)
    v = torch.zeros(7, dtype=torch.float64)
    for g in gradients:
        v = 0.9 * v + g
        w = w - 0.01 * v
    torch.testing.assert_close(end, w, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, True), (torch.float16, False)])
def test_fused_only_where_its_arithmetic_is_the_weights_own(dtype, fused):
    optimizer = make_optimizer("adamw", [nn.Parameter(torch.ones(2, dtype=dtype))], 0.01)
    assert bool(optimizer.defaults["fused"]) == fused
