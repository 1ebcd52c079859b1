"""Low-rank adapters of the linear layers inside the blocks (needs peft), merged afterwards.

Low-rank healing: frozen weights W, and for each linear layer of the blocks a change of rank r.

W' = W + (α/r)·BA with trained A (r, in) and B (out, r); B starts at 0, so that the adapted model
starts as the model itself (LoRA, Hu et al. 2021, arXiv 2106.09685). The adapters are those of the
``peft`` library; embeddings, norms, biases and the output matrix stay as they are.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from healing.config.heal import HealConfig
from healing.errors import ConfigError
from healing.models.blocks import transformer_blocks

RATE_RATIO = 10.0
"""Learning rate of adapters over that of all weights (docs/method.md, Low-rank healing)."""
KEEPS_WEIGHTS = True
"""The weights themselves must not be rounded: what is trained is added to them."""
OPTIONS = ("lora_rank", "lora_alpha")
"""Fields of the configuration that change numbers with this method alone."""


def check(config: HealConfig) -> None:
    """Check that the library peft is there, before weights are loaded.

    Raises:
        ConfigError: It is not.
    """
    _peft()


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:  # an optional extra, and slow to import
        raise ConfigError(
            f"--healing-method lora needs the library peft ({error}): "
            "pip install 'llm-healing[lora]'"
        ) from error
    return peft


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Linear layers inside the blocks by module name, GPT-2's transposed ones (``Conv1D``) too."""
    inside = {id(m) for block in transformer_blocks(model) for m in block.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) in inside
    }


def n_trainable(model: nn.Module, config: HealConfig) -> int:
    """Parameters that healing trains: r·(in + out) per adapted layer.

    Args:
        model: Without adapters.
        config: Says r.
    """
    return sum(config.lora_rank * sum(x.weight.shape) for x in linear_layers(model).values())


@contextlib.contextmanager
def adapted(
    model: PreTrainedModel, config: HealConfig, generator: torch.Generator
) -> Iterator[None]:
    """Adapters inside, which alone require gradients; merged into the weights afterwards.

    The model is changed in place and is its plain architecture again afterwards, with the same
    parameter objects, even where an exception passes through.

    Args:
        model: A causal language model.
        config: Rank r and α.
        generator: CPU generator that A is drawn from; torch's global one is left as it is.

    Raises:
        ConfigError: ``peft`` is not installed, or the blocks have no linear layer.
    """
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    tuner = _insert(model, config, generator)
    try:
        yield
    finally:
        tuner.merge_and_unload()
        for parameter, requires in required.items():
            parameter.requires_grad_(requires)


def _insert(model: PreTrainedModel, config: HealConfig, generator: torch.Generator) -> Any:
    peft, layers = _peft(), linear_layers(model)
    if not layers:
        raise ConfigError(
            f"--healing-method lora: the blocks of {type(model).__name__} hold no linear layer; "
            "use --healing-method full"
        )
    settings = peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
    )
    seed = int(torch.randint(2**62, (), generator=generator))
    # peft draws from torch's global CPU generator, whatever device the model is on.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Blocks that hold both kinds of layer: peft says that it takes each as what it is.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)
        torch.default_generator.manual_seed(seed)
        return peft.tuners.lora.LoraModel(model, settings, "healing")
