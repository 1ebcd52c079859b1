"""What :mod:`benchmarks.gpu` found, in a sentence."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.parts import OUT_OF_MEMORY, Numbers

HEALING_TARGETS = {("1b", 500): 60.0}
"""Seconds by size and steps, on an accelerator."""
ROOFLINE_TARGET = 0.5


def _target(text: str, accelerated: bool) -> str:
    return f" (target {text})" if text and accelerated else ""


def _healing(result: Numbers, accelerated: bool) -> Iterator[str]:
    found = result["healing"]
    target = HEALING_TARGETS.get((result["model"], found["steps"]))
    yield (
        f"{found['steps']} steps, {found['measurements']} measurements in "
        f"{found['loop_seconds']:.2f} s" + _target(f"{target:g} s" if target else "", accelerated)
    )
    yield (
        f"training {found['training_seconds']:.2f} s, measurements "
        f"{found['measurement_seconds']:.2f} s, of which eigenvalues "
        f"{found['eigenvalue_seconds']:.2f} s"
    )
    yield (
        f"{found['training_tokens_per_second']:,.0f} tokens/s in training, "
        f"{found['tokens_per_second']:,.0f} in all"
    )
    bound = result.get("roofline")
    if bound:
        yield (
            f"{bound['share_training']:.0%} of the roofline in training"
            + _target(f"{ROOFLINE_TARGET:.0%}", accelerated)
            + f", {bound['share_total']:.0%} in all, bound by {bound['bound']}"
        )


def _attack(result: Numbers, accelerated: bool) -> Iterator[str]:
    found = result["attack"]
    yield (
        f"attack prepared in {found['prepare_seconds']:.2f} s (decompositions "
        f"{found['decomposition_seconds']:.2f} s, search {found['search_seconds']:.2f} s)"
    )
    yield (
        f"{found['steps']} steps in {found['step_seconds']:.2f} s, diagnostics "
        f"{found['diagnostics_seconds']:.2f} s, measurements {found['measurement_seconds']:.2f} s"
    )


def _hessian_product(result: Numbers, accelerated: bool) -> Iterator[str]:
    found = result["hessian_product"]
    yield (
        f"Hessian product {found['product_seconds']:.2f} s "
        f"({found['first_product_seconds']:.2f} s with its graph)"
    )


def _lanczos(result: Numbers, accelerated: bool) -> Iterator[str]:
    found = result["lanczos"]
    yield (
        f"{found['iterations']} Lanczos iterations in {found['lanczos_seconds']:.2f} s "
        f"({found['products']} products {found['product_seconds']:.2f} s, "
        f"basis {found['basis_seconds']:.2f} s)"
    )


PARTS = {
    "healing": _healing,
    "attack": _attack,
    "hessian_product": _hessian_product,
    "lanczos": _lanczos,
}


def sentence(result: Numbers) -> str:
    """The parts of one size's report; those that did not fit say so."""
    accelerated = result["config"]["device"] != "cpu"
    said = []
    for name, words in PARTS.items():
        if result[name]["status"] == OUT_OF_MEMORY:
            said.append(f"{name.replace('_', ' ')} ran out of memory")
        else:
            said += words(result, accelerated)
    return f"{result['model']}: {'; '.join(said)}"
