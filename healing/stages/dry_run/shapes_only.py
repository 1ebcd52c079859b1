"""Tensors without content: shape, dtype and device, and no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ELEMENTWISE = {
    getattr(getattr(_aten, name), overload)
    for name, overload in (
        ("mul", "Tensor"), ("add", "Tensor"), ("sub", "Tensor"), ("div", "Tensor"),
        ("mul", "Scalar"), ("pow", "Tensor_Scalar"), ("neg", "default"), ("silu", "default"),
    )
}  # fmt: skip
"""Their results are like their arguments; torch finds that out in Python, and slowly."""
_PLAIN = _ELEMENTWISE | {
    getattr(getattr(_aten, name), overload)
    for name, overload in (
        ("view", "default"), ("_unsafe_view", "default"), ("t", "default"),
        ("transpose", "int"), ("expand", "default"), ("unsqueeze", "default"),
        ("slice", "Tensor"), ("permute", "default"), ("detach", "default"), ("mm", "default"),
        ("bmm", "default"), ("sum", "dim_IntList"), ("clone", "default"), ("select", "int"),
        ("slice_backward", "default"),
    )
}  # fmt: skip
"""The commonest operations, of one result on the device of their tensors."""


class _EverythingSelected(TorchDispatchMode):
    """Answers what depends on content: every number is 1, every test holds, every mask selects all.

    So losses are finite, steps are taken and no token is an outlier.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled: torch's guard against that takes a tenth of the time

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _aten._local_scalar_dense.default:
            return _one(args[0].dtype)
        if func in (_aten.allclose.default, _aten.equal.default):
            return True
        if func is _aten.nonzero.default:
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        if func is _aten.index.Tensor:
            args = (args[0], [i for index in args[1] for i in _as_positions(index)])
        if func in _PLAIN and (owner := _common_owner(args)) is not None:
            if func in _ELEMENTWISE and (model := _model_of_result(args)) is not None:
                func, args, kwargs = _aten.empty_like.default, (model,), None
            return _run_on_meta(func, args, kwargs or {}, *owner)
        return func(*args, **kwargs or {})


def _common_owner(args: tuple[Any, ...]) -> tuple[FakeTensorMode, torch.device] | None:
    """Mode and device of the tensors among the arguments; ``None`` where they differ, or one is a
    number or a tensor with content.
    """
    tensors = [a for a in args if isinstance(a, FakeTensor)]
    if len(tensors) < sum(isinstance(a, torch.Tensor) for a in args):
        return None
    first = tensors[0]
    if any(t.fake_device != first.fake_device or not t.ndim for t in tensors):
        return None
    return first.fake_mode, first.fake_device


def _model_of_result(args: tuple[Any, ...]) -> torch.Tensor | None:
    """The argument that an elementwise operation's result is like in shape and (floating) format;
    ``None`` where there is none such.
    """
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    kinds = {t.dtype for t in tensors}
    if len(kinds) > 1 or not tensors[0].is_floating_point():
        return None
    if len({t.shape for t in tensors}) == 1:
        return tensors[0]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    return next((t for t in tensors if t.shape == shape), None)


def _run_on_meta(
    func: Any, args: tuple[Any, ...], kwargs: Any, mode: FakeTensorMode, device: torch.device
) -> FakeTensor:
    """What ``FakeTensorMode`` does with an operation of one result that has no rule of its own,
    without the search for such rules, which takes several times as long.
    """
    with in_kernel_invocation_manager(mode):
        result = func(*args, **kwargs)
    return FakeTensor(mode, result, device)


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _as_positions(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    if index is None or index.dtype != torch.bool:
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64)] * index.ndim


def _apply(module: nn.Module, change: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
    """``Module._apply`` for tensors without content, which cannot be swapped in place."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None and (new := change(parameter)) is not parameter:
                part._parameters[name] = nn.Parameter(new.detach(), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else change(buffer)
    return module


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, tensors have shape, dtype and device, and take no memory."""
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _EverythingSelected(),
        mock.patch.object(nn.Module, "_apply", _apply),
    ):
        yield
