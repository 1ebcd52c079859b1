"""Training of the embedded models: byte-level BPE and language model, from text alone."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from healing.config.pretrain import PretrainConfig
from healing.data.splits import Corpus
from healing.data.windows import batches, pack
from healing.models.blocks import evaluation_mode
from healing.models.loading import new_embedded_model
from healing.progress import Safe, phase

END_OF_TEXT = "<|endoftext|>"
WARMUP_SHARE = 0.02


@dataclass(frozen=True)
class PretrainRecord:
    """One line of the training record.

    Attributes:
        step: Optimiser steps done.
        tokens: Training tokens seen.
        learning_rate: Of the step.
        train_loss: Mean over the steps since the last record, nats per token (NaN at step 0).
        heldout_loss: On the probe split, nats per token.
        grad_norm: Before clipping, of the last step (NaN at step 0).
    """

    step: int
    tokens: int
    learning_rate: float
    train_loss: float
    heldout_loss: float
    grad_norm: float


def train_tokenizer(texts: tuple[str, ...], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (as GPT-NeoX's) of the given texts; id 0 is end-of-text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
    )


@torch.no_grad()
def heldout_loss(model: GPTNeoXForCausalLM, windows: torch.Tensor, batch_size: int = 32) -> float:
    """Mean loss over windows, nats per token."""
    with evaluation_mode(model):
        losses = [
            model(input_ids=chunk, labels=chunk).loss.item() * len(chunk)
            for chunk in windows.split(batch_size)
        ]
    return sum(losses) / len(windows)


def learning_rate_at(step: int, total: int, peak: float) -> float:
    """Linear warm-up over 2 % of the steps, then a cosine to a tenth of the peak."""
    warmup = max(1, round(WARMUP_SHARE * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def _optimizer(model: GPTNeoXForCausalLM, config: PretrainConfig) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,
    )


@dataclass
class Pretraining:
    """A training run: what it trains on, and the model that it leaves.

    Attributes:
        config: All parameters.
        tokenizer: Trained on the ``train`` split.
        train: Training windows.
        heldout: Windows of the ``probe`` split; never trained on.
        model: The model, trained in place by :meth:`run`.
    """

    config: PretrainConfig
    tokenizer: PreTrainedTokenizerFast
    train: torch.Tensor
    heldout: torch.Tensor
    model: GPTNeoXForCausalLM

    @classmethod
    def prepare(cls, config: PretrainConfig, corpus: Corpus) -> Pretraining:
        """Train the tokenizer, pack the windows and initialise the model."""
        tokenizer = train_tokenizer(corpus.documents["train"], config.vocab_size)
        train = pack(corpus.documents["train"], tokenizer, config.sequence_length)
        heldout = pack(corpus.documents["probe"], tokenizer, config.sequence_length)[:256]
        generator = torch.Generator().manual_seed(config.seed)
        model = new_embedded_model(config.model, len(tokenizer), generator)
        return cls(config, tokenizer, train, heldout, model)

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def total_steps(self) -> int:
        """Steps that reach the configured tokens per parameter."""
        per_step = self.config.batch_size * self.config.sequence_length
        return math.ceil(self.config.tokens_per_parameter * self.n_params / per_step)

    def run(self, kept: Mapping[str, Any] | None = None) -> Iterator[PretrainRecord | Safe]:
        """Train, yielding a record at step 0, every interval and the last step, and a safe point
        after every step.

        Args:
            kept: State of a safe point to go on from; what came before it is not yielded again.
        """
        config, model, total = self.config, self.model, self.total_steps
        order = torch.Generator().manual_seed(config.seed + 1)
        stream = batches(self.train, config.batch_size, order)
        optimizer = _optimizer(model, config)
        per_step = config.batch_size * config.sequence_length
        done, losses = 0, []
        if kept is None:
            yield PretrainRecord(0, 0, 0.0, math.nan, heldout_loss(model, self.heldout), math.nan)
        else:
            model.load_state_dict(kept["weights"])
            optimizer.load_state_dict(kept["optimizer"])
            done, losses = kept["step"], list(kept["losses"])
            for _ in range(done):  # the order's generator is where it was
                next(stream)
        model.train()
        for step in phase("training", range(done + 1, total + 1), total, begin=done):
            rate = learning_rate_at(step - 1, total, config.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = next(stream)
            loss = model(input_ids=batch, labels=batch).loss
            optimizer.zero_grad()
            loss.backward()
            limit = config.gradient_clip or math.inf
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
            optimizer.step()
            losses.append(loss.item())
            if step % config.measurement_interval == 0 or step == total:
                held = heldout_loss(model, self.heldout)
                yield PretrainRecord(
                    step, step * per_step, rate, sum(losses) / len(losses), held, norm
                )
                losses.clear()
            yield Safe(step, state=functools.partial(self._state, optimizer, step, losses))
        model.eval()

    def _state(
        self, optimizer: torch.optim.Optimizer, step: int, losses: list[float]
    ) -> dict[str, Any]:
        """What training goes on from after a step."""
        return {
            "weights": self.model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "losses": list(losses),
        }

    def save(self, folder: pathlib.Path) -> None:
        """Write fp16 safetensors, config and tokenizer as a Hugging Face model folder."""
        folder.mkdir(parents=True, exist_ok=True)
        half = GPTNeoXForCausalLM(self.model.config)
        half.load_state_dict(self.model.state_dict())
        half.half().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
