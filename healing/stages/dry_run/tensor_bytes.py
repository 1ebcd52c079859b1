"""Bytes that a computation keeps alive, counted by running it on tensors without content.

Under torch's ``FakeTensorMode`` a computation allocates nothing; a dispatch mode adds up the
storages that are alive after every operation. So the count holds for any architecture and follows
the code. What it cannot see is memory that a kernel takes and gives back within one operation;
of these only the fused loss's is known and added.

torch's own ``MemTracker`` does the like, but stops at a second forward pass of the same model,
which a measurement makes, and does not tell logits from other activations.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    FakeTensor,
)
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from healing.models.token_loss import CHUNK_TOKENS

WEIGHTS, GRADIENTS, OPTIMIZER, LOGITS, ACTIVATIONS, COPIES = KINDS = (
    "weights",
    "gradients",
    "optimiser",
    "logits",
    "activations",
    "copies",
)
"""What a storage holds; activations: everything else, temporary tensors too."""

CPU = torch.device("cpu")
_DEVICE = torch.ops.prim.device.default


@dataclass
class _Storage:
    kind: str
    size: int
    block: int | None = None
    lasting: bool = False


class Moment(NamedTuple):
    """What is alive at one operation.

    Attributes:
        phase: That it is in.
        block: Of the model, that it works on; ``None``: on none.
        operation: torch's, or what else happens.
        sizes: Bytes by kind, in the order of :data:`KINDS`.
    """

    phase: str
    block: int | None
    operation: object
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all storages."""
        return sum(self.sizes)


def _inside_fused_loss(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes of one chunk's logits, which torch's fused loss holds where no dispatch mode looks."""
    if "linear_cross_entropy" not in func.name() or len(args) < 2:
        return 0
    rows, weight = args[:2]
    chunk = min(CHUNK_TOKENS, len(rows))
    return int(chunk * len(weight) * rows.element_size())


def peaks(moments: Iterable[Moment]) -> dict[str, Mapping[str, int]]:
    """Phase → kind → bytes at the moment of the phase's largest total, the first of equal ones."""
    highest: dict[str, Moment] = {}
    for moment in moments:
        if moment.phase not in highest or moment.total > highest[moment.phase].total:
            highest[moment.phase] = moment
    return {m.phase: dict(zip(KINDS, m.sizes, strict=True)) for m in highest.values()}


class Usage(TorchDispatchMode):
    """Bytes of all storages alive, by kind, and their peak in every phase.

    Args:
        vocabulary: Tensors whose last dimension it is are logits.
        device: Whose memory is counted.

    Attributes:
        moments: One for every operation that takes memory; what happens outside of any phase has
            none, but its storages count as long as they live.
    """

    def __init__(self, vocabulary: int, device: torch.device = CPU) -> None:
        super().__init__()
        self._device = device.type
        self.moments: list[Moment] = []
        self._vocabulary, self._phase, self._stepping = vocabulary, "", False
        # Of the operation under way; of those that made the graph, by their nodes' numbers.
        self._storages = 0  # made so far
        self._block: int | None = None
        self._outside = False
        self._inside: list[int] = []
        self._made_in: dict[int, int | None] = {}
        self._unnamed = ACTIVATIONS
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._now = dict.fromkeys(KINDS, 0)
        self._hooks: contextlib.ExitStack = contextlib.ExitStack()

    def __enter__(self) -> Usage:
        """Watch every operation and the optimisers' steps."""
        before = register_optimizer_step_pre_hook(lambda o, *_: self._step(o, inside=True))
        after = register_optimizer_step_post_hook(lambda o, *_: self._step(o, inside=False))
        self._noted = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        """Stop watching."""
        self._hooks.close()
        super().__exit__(*args)

    def _step(self, optimizer: Optimizer, *, inside: bool) -> None:
        self._stepping = inside
        # A low number format gives the parameters new storages.
        self.claim(WEIGHTS, (p for group in optimizer.param_groups for p in group["params"]))
        if not inside:
            states = [v for state in optimizer.state.values() for v in state.values()]
            self.claim(OPTIMIZER, [v for v in states if isinstance(v, torch.Tensor)])

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks inside are those of this phase."""
        previous, self._phase = self._phase, name
        self._note("begin")
        try:
            yield
        finally:
            self._phase = previous

    def claim(self, kind: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say what storages hold."""
        for tensor in tensors:
            if tensor.device.type != self._device:
                continue
            entry = self._entry(tensor, kind)
            self._now[entry.kind] -= entry.size
            self._now[kind] += entry.size
            entry.kind = kind
            entry.lasting = True
        self._note("claim")

    def new(self, kind: str, shapes: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Storages of the sizes of others, known as what they hold from the start."""
        self._unnamed = kind
        made = [torch.empty_like(tensor) for tensor in shapes]
        self._unnamed = ACTIVATIONS
        return made

    def watch_gradients(self, model: nn.Module) -> None:
        """Tell the gradients of what requires them from other tensors of the backward pass."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p: self.claim(GRADIENTS, [] if p.grad is None else [p.grad])
                )

    def _entry(self, tensor: torch.Tensor, kind: str) -> _Storage:
        storage = tensor.untyped_storage()
        found: _Storage | None = self._entries.get(storage)
        if found is None:
            found = _Storage(kind, storage.nbytes(), self._block, self._outside)
            self._entries[storage] = found
            self._storages += 1
            self._now[kind] += found.size
            weakref.finalize(storage, self._drop, found)
        return found

    def _drop(self, entry: _Storage) -> None:
        self._now[entry.kind] -= entry.size

    def _sizes(self, logits: int = 0) -> tuple[int, ...]:
        before = self._now[LOGITS]
        self._now[LOGITS] += logits
        sizes = tuple(self._now.values())
        self._now[LOGITS] = before
        return sizes

    def _note(self, operation: object, *sizes: tuple[int, ...]) -> None:
        """Add a moment: the higher one of what is given and of now."""
        if self._phase:
            highest = max(*sizes, self._sizes(), key=sum) if sizes else self._sizes()
            self.moments.append(Moment(self._phase, self._block, operation, highest))

    def watch_blocks(self, blocks: Iterable[nn.Module]) -> None:
        """Tell the operations of each block from those of others: in its forward pass, in the
        derivatives of what was done there, and where its parameters are all that is worked on.
        """
        for number, block in enumerate(blocks):
            for parameter in block.parameters():
                entry = self._entry(parameter, WEIGHTS)
                entry.block, entry.lasting = number, True
            block.register_forward_pre_hook(lambda *_, n=number: self._inside.append(n))
            block.register_forward_hook(self._leave, always_call=True)

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def _block_of(self, args: tuple[Any, ...]) -> int | None:
        """Whose operation one is."""
        self._outside = False
        block = self._inside[-1] if self._inside else self._block_of_node(args)
        # What autograd has noted since the operation before is of this one.
        number = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        for made in range(self._noted, number):
            self._made_in[made] = block
        self._noted = number
        return block

    def _block_of_node(self, args: tuple[Any, ...]) -> int | None:
        node = torch._C._current_autograd_node()
        self._outside = node is None
        if node is None:
            return self._block_of_arguments(args)
        variable = getattr(node, "variable", None)  # where a gradient comes to rest
        if variable is not None:
            return self._block_of_tensors([variable])
        return self._made_in.get(node._sequence_nr())

    def _block_of_arguments(self, args: tuple[Any, ...]) -> int | None:
        if args and isinstance(args[0], (tuple, list)):  # of many blocks together it is on none
            blocks = {self._block_of_tensors([a]) for a in args[0] if isinstance(a, torch.Tensor)}
            return blocks.pop() if len(blocks) == 1 else None
        return self._block_of_tensors(a for a in args if isinstance(a, torch.Tensor))

    def _block_of_tensors(self, tensors: Iterable[torch.Tensor]) -> int | None:
        """Whose tensors they are; what a pass left there tells less than what lasts, since it may
        have been made by the block behind.
        """
        found = [self._entries.get(tensor.untyped_storage()) for tensor in tensors]
        owned = [entry for entry in found if entry is not None and entry.block is not None]
        lasting = [entry for entry in owned if entry.lasting]
        return next((entry.block for entry in lasting or owned), None)

    def on_block_of(
        self, method: Callable[..., Any], tensor: Callable[[Any], torch.Tensor]
    ) -> Callable[..., Any]:
        """A method whose operations are on the block that a tensor of its object belongs to."""

        def watched(owner: Any, *args: Any, **options: Any) -> Any:
            block = self._block_of_tensors([tensor(owner)])
            if block is None:
                return method(owner, *args, **options)
            self._inside.append(block)
            try:
                return method(owner, *args, **options)
            finally:
                self._inside.pop()

        return watched

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as for tensors without content

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operation and take its new storages into account."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked twice per operation, and nothing is computed
        self._block = self._block_of(args)
        result = func(*args, **kwargs or {})
        known, kernel = self._storages, _inside_fused_loss(func, args)
        beside = self._sizes(kernel)
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.device.type == self._device:
                is_logits = value.ndim >= 2 and value.shape[-1] == self._vocabulary
                other = OPTIMIZER if self._stepping else self._unnamed
                self._entry(value, LOGITS if is_logits else other)
        if self._storages > known or kernel:
            self._note(func, beside)
        return result
