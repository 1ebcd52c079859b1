"""Weights that have to be made before they can be used: from a GGUF file, from an adapter."""

from __future__ import annotations

import math
import pathlib
import warnings
from collections import Counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.gguf import GgufHeader
from transformers.utils import is_accelerate_available, is_gguf_available

from healing.models.weight_headers import UnusableError


def fresh_copy(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The same weights in a model that knows nothing of how they were loaded: transformers would
    refuse to save, or save under other names, what it dequantized or renamed while loading.

    Args:
        model: float32, on the CPU.
        config: Without quantization settings.
    """
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, and replaced
        fresh: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=model.config._attn_implementation
        )
    fresh.load_state_dict(model.state_dict(), strict=True)
    return fresh


def require_gguf() -> None:
    """Check that GGUF files can be read here.

    Raises:
        UnusableError: What is to be installed.
    """
    if not (is_gguf_available() and is_accelerate_available()):
        raise UnusableError(
            "reading a GGUF file needs the packages gguf and accelerate",
            "run: pip install -e '.[gguf]'",
        )


def quantization_of(path: pathlib.Path) -> str:
    """Format of most of a GGUF file's numbers, as it is named there: ``Q4_1``, ``F16``."""
    from gguf import GGMLQuantizationType

    header: Any = GgufHeader.from_file(str(path))
    counts: Counter[int] = Counter()
    for tensor in header.tensors:
        counts[tensor.ggml_type] += math.prod(tensor.shape)
    return str(GGMLQuantizationType(counts.most_common(1)[0][0]).name)


def merged(base: PreTrainedModel, adapter: pathlib.Path) -> PreTrainedModel:
    """A base model with an adapter's change added to its weights.

    Args:
        base: float32, on the CPU; changed in place.
        adapter: Folder with adapter_config.json and its weights.

    Raises:
        UnusableError: The adapter is not of this base, or of a kind that cannot be merged, or
            peft is not installed.
    """
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        reason = "merging an adapter needs the package peft"
        raise UnusableError(reason, "run: pip install -e '.[lora]'") from error
    kind: Any = PeftConfig.from_pretrained(str(adapter))
    if kind.is_prompt_learning or kind.is_adaption_prompt:
        raise UnusableError(
            f"its adapter is a prompt ({kind.peft_type.value}), which is no change of weights",
            "name a LoRA adapter or a whole model",
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped: Any = PeftModel.from_pretrained(base, str(adapter), torch_device="cpu")
    lacking = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if lacking:
        raise UnusableError(
            "its adapter lacks weights for the base model that it names",
            "name in adapter_config.json the base that the adapter was trained on",
        )
    plain: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    return plain
