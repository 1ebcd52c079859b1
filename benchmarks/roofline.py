"""The shortest time in which a device could take one fine-tuning step (Williams et al. 2009).

A step needs F operations and moves B bytes; on a device of P operations and W bytes per second it
takes at least max(F/P, B/W), and the larger of the two says what bounds it. P and W are measured: a
large matrix product in the training format, a large copy.

What is left out (activations, norms and checks, everything that is no matrix product) would make
the bound larger: a loop's share of the roofline is never overstated by it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.stopwatch import seconds_of
from healing.models.blocks import embedding_matrix, transformer_blocks
from healing.training.precision import Precision

FLOAT32, MOMENTS = 4, 2


def device_speed(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured speed of a large matrix product (flop/s) and of a large copy (bytes/s)."""
    n, copied = (8192, 2**30) if device.type != "cpu" else (1024, 2**26)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = seconds_of(lambda: a @ b, device, 10)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device, 10)
    # A product takes n² · (n multiplications and n additions); a copy reads and writes.
    return {"flops_per_second": 2 * n**3 / product, "bytes_per_second": 2 * copied / copy}


def linear_parameters(model: nn.Module) -> int:
    """Entries of the matrices that hidden states are multiplied by (the embeddings' are not)."""
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def step_flops(model: PreTrainedModel, windows: int, length: int) -> int:
    """Of the matrix products in one forward and backward pass of a GPT-NeoX.

    Two per matrix entry and token in the forward pass, twice that in the backward pass (gradients
    of input and of weight); the output matrix sees only the length − 1 tokens that predict. Per
    block, queries × keys and attention × values: 4 · length² · hidden per window, thrice with the
    backward pass; the masked half is counted, at length 128 less than 2 % of a Pythia's whole.
    """
    tokens, predicting = windows * length, windows * (length - 1)
    head = model.get_output_embeddings().weight.numel()
    inside = linear_parameters(model) - head
    blocks, hidden = len(transformer_blocks(model)), embedding_matrix(model).shape[1]
    attention = 4 * windows * length**2 * hidden * blocks
    return 6 * (tokens * inside + predicting * head) + 3 * attention


def step_bytes(model: nn.Module, precision: Precision) -> dict[str, int]:
    """Of weights, gradients and optimiser state that one AdamW step moves, by purpose.

    Args:
        model: In float32 weights.
        precision: ``fp32``, or a low format under autocast.

    Returns:
        *products*: every linear weight read by the forward and by the backward pass, in the format
        of the products. *gradients*: written once, in float32. *casts* (autocast): linear weights
        read in float32 and written in the low format, their gradients written and read in it.
        *optimiser*: weight, gradient and both moments read, weight and both moments written.
    """
    everything = sum(p.numel() for p in model.parameters())
    linear, size = linear_parameters(model), precision.dtype.itemsize
    return {
        "products": 2 * size * linear,
        "gradients": FLOAT32 * everything,
        "casts": (FLOAT32 + 3 * size) * linear if precision.cast else 0,
        "optimiser": FLOAT32 * (2 + MOMENTS + 1 + MOMENTS) * everything,
    }


def roofline(speed: dict[str, float], flops: int, moved: dict[str, int]) -> dict[str, Any]:
    """Both bounds of a step in seconds, the larger one, and which it is."""
    compute = flops / speed["flops_per_second"]
    memory = sum(moved.values()) / speed["bytes_per_second"]
    return {
        "flops": flops,
        "bytes": moved,
        "compute_seconds": compute,
        "memory_seconds": memory,
        "step_seconds": max(compute, memory),
        "bound": "compute" if compute > memory else "memory",
    }
