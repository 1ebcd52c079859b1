"""A model spread over ranks, and its states as one process has them.

Torch's FSDP2 (``fully_shard``) keeps of every parameter, its gradient and its moments one part on
each rank, and gathers a block's weights while the block computes. Under ``ddp`` the same code keeps
all of them on every rank: a mesh whose second dimension, along which weights are cut, has size 1.

States leave and enter through rank 0, as plain tensors on the CPU in the format of one process, so
that any number of ranks goes on from them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from healing.config.heal import REPLICATED
from healing.models.blocks import transformer_blocks
from healing.models.sharing import own_part, whole
from healing.models.token_loss import as_method


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model without its weights (on torch's ``meta`` device), ties and buffers kept."""
    bare: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, bare)


def spread(
    bare: PreTrainedModel, mode: str, ranks: int, device: torch.device, *, plain: bool
) -> PreTrainedModel:
    """Make a model without weights one whose parts the ranks have; the weights are not set yet.

    Args:
        bare: See :func:`skeleton`; changed in place.
        mode: ``fsdp`` or ``ddp``.
        ranks: In the process group.
        device: Of this rank.
        plain: Whether its logits are its output matrix times its last hidden state.
    """
    if mode == REPLICATED:
        names = ("replicas", "parts")
        mesh = init_device_mesh(device.type, (ranks, 1), mesh_dim_names=names)
    else:
        mesh = init_device_mesh(device.type, (ranks,))
    register = as_method(bare, plain=plain)
    for block in transformer_blocks(bare):
        fully_shard(block, mesh=mesh)
    fully_shard(bare, mesh=mesh)
    register_fsdp_forward_method(bare, register)
    buffers = {name: buffer.detach().clone() for name, buffer in bare.named_buffers()}
    bare.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in bare.named_buffers():
            buffer.copy_(buffers[name])
    return bare


def _target(like: torch.Tensor, given: torch.Tensor | None, device: torch.device) -> torch.Tensor:
    """Rank 0's tensor on the device; room for it on the others."""
    if given is None:
        return torch.empty(like.shape, dtype=like.dtype, device=device)
    return given.detach().to(device=device, dtype=like.dtype).contiguous()


def _handed_out(
    like: torch.Tensor, given: torch.Tensor | None, device: torch.device
) -> torch.Tensor:
    """A tensor that rank 0 gives, spread as another is; on all ranks together."""
    tensor = _target(like, given, device)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    if distributed.get_world_size() > 1:
        distributed.broadcast(tensor, 0)
    return tensor


def _distinct(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of the state, each tensor of tied ones once."""
    seen = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            yield name, value


@torch.no_grad()
def set_weights(model: nn.Module, given: Mapping[str, torch.Tensor] | None) -> None:
    """Take rank 0's weights: parameters and buffers of the state.

    Args:
        model: Spread.
        given: The whole state; ``None`` on other ranks.
    """
    device = next(model.parameters()).device
    for name, value in _distinct(model):
        value.copy_(_handed_out(value, None if given is None else given[name], device))


def whole_weights(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """The whole state on the CPU, tied tensors once under each of their names; {} where it is not
    kept. One tensor at a time is whole on a device.
    """
    found: dict[int, torch.Tensor] = {}
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in found:
            found[id(value)] = _on_cpu(value.detach(), keep=keep)
        state[name] = found[id(value)]
    return state if keep else {}


def _on_cpu(value: torch.Tensor, *, keep: bool) -> torch.Tensor:
    tensor = whole(value)
    # A copy in any case: what is gathered may be the part itself where there is one rank.
    return tensor.cpu().clone() if keep else torch.empty(0)


def whole_optimizer(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """Its state as that of a model in one process; {} where it is not kept."""
    state = optimizer.state_dict()
    moments = {
        number: {
            name: _on_cpu(value, keep=keep) if isinstance(value, torch.Tensor) else value
            for name, value in entries.items()
        }
        for number, entries in state["state"].items()
    }
    return {**state, "state": moments} if keep else {}


@dataclass(frozen=True)
class Outline:
    """A tensor that rank 0 has: what others must know of it to receive it."""

    shape: torch.Size
    dtype: torch.dtype


def outlined(state: Any) -> Any:
    """A state with outlines in the place of tensors."""
    if isinstance(state, torch.Tensor):
        return Outline(state.shape, state.dtype)
    if isinstance(state, dict):
        return {name: outlined(value) for name, value in state.items()}
    return state


def set_optimizer(
    optimizer: torch.optim.Optimizer, outline: Mapping[str, Any], given: Mapping[str, Any] | None
) -> None:
    """Take rank 0's state of an optimiser over the same parameters.

    Args:
        optimizer: Over the parameters of a spread model.
        outline: See :func:`outlined`.
        given: The whole state; ``None`` on other ranks.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict[str, Any]] = {}
    for number, entries in outline["state"].items():
        parameter = parameters[number]
        moments[number] = {}
        for name, value in entries.items():
            if not isinstance(value, Outline):
                moments[number][name] = value
                continue
            source = None if given is None else given["state"][number][name]
            # A step's number is a scalar that every rank has; what has the weights' shape is cut.
            cut = value.shape == parameter.shape
            like = parameter.detach() if cut else torch.empty(value.shape, dtype=value.dtype)
            moments[number][name] = _handed_out(like, source, like.device)
    optimizer.load_state_dict({**outline, "state": moments})


def own_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes that this rank has of some tensors."""
    return sum(own_part(tensor).nbytes for tensor in tensors)
