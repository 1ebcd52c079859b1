"""What :mod:`benchmarks.gpu` found, in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.parts import OK, Numbers

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


def _eigenvalues(result: Numbers, accelerated: bool) -> Iterator[str]:
    found = result["eigenvalues"]
    yield (
        f"eigenvalues of {found['blocks']} blocks of {found['hidden']}: batched "
        f"{found['batched_seconds']:.3f} s, one by one {found['single_seconds']:.3f} s, on the "
        f"host {found['host_seconds']:.3f} s"
    )


def _bases(result: Numbers, accelerated: bool) -> Iterator[str]:
    found = result["bases"]
    yield (
        f"bases of all matrices: Gram {found['gram_seconds']:.1f} s, SVD "
        f"{found['svd_seconds']:.1f} s"
    )


def _alignment(result: Numbers, accelerated: bool) -> Iterator[str]:
    found = result["alignment"]
    yield (
        f"ρ of {found['sequences']} sequences: Gram {found['gram_seconds']:.2f} s, dense "
        f"{found['dense_seconds']:.2f} s"
    )


PARTS = {
    "healing": _healing,
    "eigenvalues": _eigenvalues,
    "bases": _bases,
    "alignment": _alignment,
    "attack": _attack,
    "hessian_product": _hessian_product,
    "lanczos": _lanczos,
}


def sentence(result: Numbers) -> str:
    """The parts of one size's report; those that did not fit say so."""
    accelerated = result["config"]["device"] != "cpu"
    said = []
    for name, words in PARTS.items():
        if (status := result[name]["status"]) != OK:
            said.append(f"{name.replace('_', ' ')}: {status}")
        else:
            said += words(result, accelerated)
    return f"{result['model']}: {'; '.join(said)}"


ROWS = {
    "{steps} steps, {measurements} measurements": ("healing", "{loop_seconds:.1f} s"),
    "– training": ("healing", "{training_seconds:.1f} s"),
    "– measurements": ("healing", "{measurement_seconds:.1f} s"),
    "– of these eigenvalues": ("healing", "{eigenvalue_seconds:.1f} s"),
    "tokens per second in training": ("healing", "{training_tokens_per_second:,.0f}"),
    "share of the roofline in training": ("roofline", "{share_training:.0%}"),
    "peak memory of healing": ("healing", "{peak_gigabytes:.1f} GB"),
    "eigenvalues of one measurement: batched, one by one, host": (
        "eigenvalues",
        "{batched_seconds:.3f}, {single_seconds:.3f}, {host_seconds:.3f} s",
    ),
    "bases of all matrices: Gram, SVD": ("bases", "{gram_seconds:.1f}, {svd_seconds:.1f} s"),
    "ρ of {sequences} sequences: Gram, dense": (
        "alignment",
        "{gram_seconds:.2f}, {dense_seconds:.2f} s",
    ),
    "attack: preparation": ("attack", "{prepare_seconds:.1f} s"),
    "attack: {steps} steps, measurements": (
        "attack",
        "{step_seconds:.2f}, {measurement_seconds:.2f} s",
    ),
    "peak memory of the attack": ("attack", "{peak_gigabytes:.1f} GB"),
    "Hessian product, with its graph": (
        "hessian_product",
        "{product_seconds:.2f}, {first_product_seconds:.2f} s",
    ),
    "{iterations} Lanczos iterations": ("lanczos", "{lanczos_seconds:.1f} s"),
}
"""Row of the table → part, and its numbers in words."""


def _cell(result: Numbers, part: str, words: str) -> str:
    found = dict(result.get(part) or {})
    if found.get("status", OK) != OK:
        return found["status"]
    if found.get("peak_bytes") is not None:
        found["peak_gigabytes"] = found["peak_bytes"] / 1e9
    try:
        return words.format(**found)
    except KeyError:
        return "–"  # not counted here, or the part that it rests on failed


def _title(result: Numbers, part: str, words: str) -> str:
    counts = {"steps": "all", "measurements": "all", "sequences": "all", "iterations": "all"}
    return words.format(**{**counts, **(result.get(part) or {})})


def table(results: Sequence[Numbers]) -> str:
    """Rows for docs/performance.md, a column per size."""
    if not results:
        return ""
    lines = [
        " | ".join(["", "what", *(r["model"] for r in results), ""]).strip(),
        "|" + "---|" * (1 + len(results)),
    ]
    for title, (part, words) in ROWS.items():
        named = next((_title(r, part, title) for r in results), title)
        cells = [_cell(result, part, words) for result in results]
        lines.append(" | ".join(["", named, *cells, ""]).strip())
    device = results[0]["environment"]["device"]
    return f"{device}, torch {results[0]['environment']['torch']}\n" + "\n".join(lines)
