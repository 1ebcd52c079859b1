"""Curvature of a loss at a model's parameters: Hessian-vector products and what is read from them.

The loss is the weighted mean over a fixed list of batches, the model is evaluated in `eval()`
mode, and every product is over the same batches, so the Hessian is one fixed symmetric matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from healing.curvature.lanczos import LanczosResult

LossClosure = Callable[[nn.Module, Any], Tensor]
Method = Literal["exact", "finite_difference"]
Order = Literal["algebraic", "magnitude"]

# C in the relative truncation error C·ε² of the central difference, see `HessianOperator`.
_TRUNCATION_CONSTANT = 9.0
_DTYPES = (torch.float32, torch.float64)


class HessianOperator:
    """Hessian of a mean loss in a subset of a model's parameters, as a linear operator.

    H = Σ_b (w_b / Σw) ∇²L_b, with L_b the mean loss of batch b and w_b its number of predicted
    tokens, so that H is the Hessian of the mean over all tokens. Vectors are flat, in the order
    of `parameters`; `split` and `flatten` convert.

    `method="exact"` differentiates the gradient graph once more, ∇(∇L·v) (Pearlmutter 1994):
    about three gradients per product, two within `retained_graphs`. Attention of transformers
    models is written out (`twice_differentiable_attention`), since the fused kernels have no second
    derivative.

    `method="finite_difference"` is [∇L(θ + hv) - ∇L(θ - hv)] / 2h: two gradients, any kernel. The
    step moves the largest entry by a fixed share of the parameters' root mean square,
    h = ε·rms(θ)/max|v|: the truncation is governed by how far single weights move, and the
    Euclidean norm does not see that (leading eigenvectors are 50 to 250 times as peaked as their
    root mean square, isotropic directions 5 times; a step scaled by ‖v‖ that suits the one is off
    by a factor of 80 for the other). The relative error is about C·ε² (truncation) + u/ε
    (rounding, u the unit roundoff), least at ε = (u/2C)^⅓; C = 9 was fitted on the trained nano and
    micro models, where the gradient, an isotropic direction and the leading and most negative
    eigenvectors all come out within 1e-3 in float32. Along a direction far flatter than the rest
    only ‖error‖ ≪ ‖H‖‖v‖ holds. u is that of the loss: transformers computes a float64 model's
    loss in float32, and with the step of float64 the products would be 2 % off.

    Source:
        Pearlmutter 1994, Neural Computation 6(1), for both; Nocedal & Wright 2006, section 8.1,
        for the step.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_closure: LossClosure,
        batches: Sequence[Any],
        weights: Sequence[float],
        *,
        parameters: Iterable[nn.Parameter] | None = None,
        method: Method = "exact",
        relative_step: float | None = None,
    ) -> None:
        """Check the arguments; nothing is evaluated and the model is left as it is.

        Args:
            model: Module whose parameters the loss depends on; evaluated in `eval()` mode.
            loss_closure: `loss_closure(model, batch)` returns a scalar mean loss, nats per token.
            batches: What the closure takes, one element per batch; revisited in order.
            weights: Predicted tokens of each batch (B·(T - 1) for packed windows), > 0.
            parameters: The subset, in the order of the flat vector; all of the model's by default.
            method: How a product is formed.
            relative_step: ε of `finite_difference`, > 0; by default (u/2C)^⅓, u the unit roundoff
                of the loss.

        Raises:
            ValueError: For no batch, weights that do not match the batches or are not positive,
                parameters that are empty, repeated or not the model's, an unknown method, or a
                step that is not positive.
            TypeError: If the parameters are not all float32 or all float64.
        """
        self._model = model
        self._loss_closure = loss_closure
        self._batches = tuple(batches)
        self._parameters = list(model.parameters() if parameters is None else parameters)
        self._method = method
        _validate(model, self._batches, weights, self._parameters)
        if method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {method!r}")
        self._relative_step = relative_step
        if relative_step is not None and not relative_step > 0:
            raise ValueError(f"relative_step must be positive, got {relative_step}")
        self._weights = [float(weight) / sum(weights) for weight in weights]
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._retained: dict[int, list[Tensor]] | None = None
        self._versions: list[int] = []

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, n)`, n the number of scalar parameters in the subset."""
        return sum(self._sizes), sum(self._sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and of every product."""
        return self._parameters[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters and of every product."""
        return self._parameters[0].device

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a flat `(n,)` vector in the shapes of the parameters."""
        parts = torch.split(vector, self._sizes)
        return [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)]

    def flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        """Flat `(n,)` vector of tensors in the shapes of the parameters."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def gradient(self) -> Tensor:
        """Gradient of the weighted mean loss, shape `(n,)`, nats per token per unit of θ."""
        with _differentiating(self._model, self._parameters):
            return self._gradient()

    def matvec(self, vector: Tensor) -> Tensor:
        """Product Hv, shape `(n,)`; `vector` is converted to the operator's dtype and device.

        Raises:
            ValueError: If `vector` has not shape `(n,)`.
        """
        if vector.shape != self.shape[:1]:
            raise ValueError(f"expected shape ({self.shape[0]},), got {tuple(vector.shape)}")
        return self._products([vector])[0]

    __call__ = matvec

    def matmat(self, matrix: Tensor) -> Tensor:
        """Products HV of shape `(n, k)`; the gradient graph of a batch serves all k columns.

        Raises:
            ValueError: If `matrix` has not shape `(n, k)`.
        """
        if matrix.ndim != 2 or len(matrix) != self.shape[0]:
            raise ValueError(f"expected shape ({self.shape[0]}, k), got {tuple(matrix.shape)}")
        return torch.stack(self._products(list(matrix.unbind(1))), dim=1)

    @contextmanager
    def retained_graphs(self) -> Iterator[None]:
        """Keep every batch's gradient graph, so that a further exact product costs two gradients.

        Memory grows by one gradient graph (about three times the activations) per batch. The
        parameters must not change inside; a change that autograd counts raises `RuntimeError`
        at the next product. No effect on finite differences.
        """
        self._retained = {}
        try:
            yield
        finally:
            self._retained = None

    def _products(self, vectors: list[Tensor]) -> list[Tensor]:
        converted = [v.detach().to(device=self.device, dtype=self.dtype) for v in vectors]
        with _differentiating(self._model, self._parameters):
            if self._method == "finite_difference":
                return [self._difference(vector) for vector in converted]
            return self._second_backward(converted)

    def _gradient(self) -> Tensor:
        total = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        for batch, weight in zip(self._batches, self._weights, strict=True):
            loss = self._loss_closure(self._model, batch)
            parts = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
            self._accumulate(total, parts, weight)
        return total

    def _accumulate(self, total: Tensor, parts: Sequence[Tensor], weight: float) -> None:
        """Add `weight` times one batch's contribution to the flat `total`, in place."""
        for view, part in zip(self.split(total), parts, strict=True):
            view.add_(part, alpha=weight)

    def _second_backward(self, vectors: list[Tensor]) -> list[Tensor]:
        """Exact products: differentiate each batch's gradient once more along each vector."""
        totals = [torch.zeros_like(vector) for vector in vectors]
        for index, weight in enumerate(self._weights):
            gradients = self._gradient_graph(index)
            for position, (vector, total) in enumerate(zip(vectors, totals, strict=True)):
                last = self._retained is None and position == len(vectors) - 1
                parts = self._differentiate_along(gradients, vector, retain_graph=not last)
                self._accumulate(total, parts, weight)
        return totals

    def _gradient_graph(self, index: int) -> list[Tensor]:
        """Gradient of batch `index` with its graph, from `retained_graphs` if it is there."""
        versions = [parameter._version for parameter in self._parameters]
        if self._retained and versions != self._versions:
            raise RuntimeError("parameters changed while their gradient graphs were retained")
        self._versions = versions
        if self._retained is not None and index in self._retained:
            return self._retained[index]
        # Reverse over reverse: forward over reverse is no dearer in principle, but torch 2.13 has
        # the forward derivative of a layer norm's weight gradient wrong (the tests show it).
        with twice_differentiable_attention(self._model):
            loss = self._loss_closure(self._model, self._batches[index])
            gradients = list(
                torch.autograd.grad(
                    loss, self._parameters, create_graph=True, materialize_grads=True
                )
            )
        if self._retained is not None:
            self._retained[index] = gradients
        return gradients

    def _differentiate_along(
        self, gradients: list[Tensor], vector: Tensor, *, retain_graph: bool
    ) -> Sequence[Tensor]:
        """∇(Σ gradients·vector); gradients without a graph (of linear terms) contribute zero."""
        pairs = zip(gradients, self.split(vector), strict=True)
        curved = [(g, v) for g, v in pairs if g.requires_grad]
        if not curved:
            return [torch.zeros_like(parameter) for parameter in self._parameters]
        outputs, directions = zip(*curved, strict=True)
        parts: Sequence[Tensor] = torch.autograd.grad(
            outputs,
            self._parameters,
            grad_outputs=directions,
            retain_graph=retain_graph,
            materialize_grads=True,
        )
        return parts

    def _difference(self, vector: Tensor) -> Tensor:
        """Central difference of gradients along `vector`; the parameters come back bitwise."""
        saved = self.flatten(parameter.detach() for parameter in self._parameters)
        largest = vector.abs().max().item()
        if largest == 0:
            return torch.zeros_like(vector)
        scale = torch.linalg.vector_norm(saved).item() / math.sqrt(len(saved))
        step = self._step() * scale / largest
        try:
            self._assign(torch.add(saved, vector, alpha=step))
            change = self._gradient()
            self._assign(torch.sub(saved, vector, alpha=step))
            change -= self._gradient()
        finally:
            self._assign(saved)
        return change.div_(2 * step)

    @torch.no_grad()
    def _step(self) -> float:
        """ε as given, or the one that suits the dtype in which the loss comes."""
        if self._relative_step is None:
            dtype = self.dtype
            if dtype is torch.float64:
                dtype = self._loss_closure(self._model, self._batches[0]).dtype
            self._relative_step = _default_step(dtype)
        return self._relative_step

    @torch.no_grad()
    def _assign(self, vector: Tensor) -> None:
        for parameter, part in zip(self._parameters, self.split(vector), strict=True):
            parameter.copy_(part)


def _default_step(dtype: torch.dtype) -> float:
    unit_roundoff = torch.finfo(dtype).eps / 2
    return math.cbrt(unit_roundoff / (2 * _TRUNCATION_CONSTANT))


def _validate(
    model: nn.Module,
    batches: Sequence[Any],
    weights: Sequence[float],
    parameters: Sequence[nn.Parameter],
) -> None:
    if not batches or len(weights) != len(batches):
        raise ValueError(f"need one weight per batch, got {len(weights)} for {len(batches)}")
    if not all(0 < weight < math.inf for weight in weights):
        raise ValueError(f"weights must be positive and finite, got {list(weights)}")
    identities = {id(parameter) for parameter in parameters}
    if not parameters or len(identities) < len(parameters):
        raise ValueError("parameters must be distinct and at least one")
    if not identities <= {id(parameter) for parameter in model.parameters()}:
        raise ValueError("parameters must belong to the model")
    dtypes = {parameter.dtype for parameter in parameters}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise TypeError(f"parameters must be all float32 or all float64, got {dtypes}")


@contextmanager
def twice_differentiable_attention(model: nn.Module) -> Iterator[None]:
    """Attention with all derivatives inside, as before afterwards.

    The float32 transformers models at or below `model` are switched to attention written out in
    torch operations. Their float64 ones would then still take the softmax in float32, so for those
    torch's fused kernels are turned off instead, which acts on the whole process: a float64 model
    is for checks, not for cells that share a process with others.
    """
    switchable: list[Any] = [m for m in model.modules() if hasattr(m, "set_attn_implementation")]
    if any(parameter.dtype is torch.float64 for parameter in model.parameters()):
        with sdpa_kernel(SDPBackend.MATH):
            yield
        return
    before = [(module, module.config._attn_implementation) for module in switchable]
    try:
        for module in switchable:
            module.set_attn_implementation("eager")
        yield
    finally:
        for module, implementation in before:
            module.set_attn_implementation(implementation)


@contextmanager
def _differentiating(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradients on, and `parameters` alone requiring them; all restored at exit."""
    training = [(module, module.training) for module in model.modules()]
    requiring = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in requiring:
            parameter.requires_grad_(flag)


class LeadingSubspace:
    """Span of k leading eigenvectors, and the low-curvature complement.

    Attributes:
        basis: Q, orthonormal columns, shape `(n, k)`.
    """

    def __init__(self, vectors: Tensor) -> None:
        """Orthonormalise by QR: Ritz vectors are orthogonal only up to their basis' rounding.

        Args:
            vectors: Spanning vectors as columns, shape `(n, k)`, 1 ≤ k ≤ n.

        Raises:
            ValueError: If `vectors` has another shape, is not finite or is rank deficient.
        """
        if vectors.ndim != 2 or not 1 <= vectors.shape[1] <= len(vectors):
            raise ValueError(f"expected shape (n, k), 1 <= k <= n, got {tuple(vectors.shape)}")
        if not torch.isfinite(vectors).all():
            raise ValueError("vectors are not finite")
        basis, triangle = torch.linalg.qr(vectors)
        scale = torch.linalg.vector_norm(vectors, dim=0)
        least = 100 * torch.finfo(vectors.dtype).eps * scale
        if not (triangle.diagonal().abs() > least).all():
            raise ValueError("vectors are linearly dependent")
        self.basis = basis

    @classmethod
    def from_lanczos(cls, result: LanczosResult, k: int, *, by: Order = "algebraic") -> Self:
        """Span of the k pairs of largest λ (`by="algebraic"`) or largest |λ| (`"magnitude"`).

        By magnitude, k pairs must have been computed at *both* ends, so that none can be missed.

        Raises:
            ValueError: If `result` holds too few pairs, or `by` is unknown.
        """
        if by not in get_args(Order):
            raise ValueError(f"by must be one of {get_args(Order)}, got {by!r}")
        ends = [result.largest, result.smallest] if by == "magnitude" else [result.largest]
        available = min(len(end.values) for end in ends)
        if not 1 <= k <= available:
            raise ValueError(f"asked for {k} leading vectors, {available} are available")
        values = torch.cat([end.values for end in ends])
        vectors = torch.cat([end.vectors for end in ends], dim=1)
        order = torch.argsort(values.abs() if by == "magnitude" else values, descending=True)
        return cls(vectors[:, order[:k].to(vectors.device)])

    def project(self, vector: Tensor) -> Tensor:
        """The part outside the span: v - Q Qᵀ v, same shape `(n,)` or `(n, m)`."""
        outside: Tensor = vector - self.basis @ (self.basis.T @ vector)
        return outside
