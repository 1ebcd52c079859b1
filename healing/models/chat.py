"""Chats as text, by the template of a model's tokenizer."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from healing.config.presets import model_label
from healing.errors import ModelError
from healing.models.model_files import locate, read_tokenizer


@dataclass(frozen=True)
class ChatTemplate:
    """Makes one text of the messages of a chat; its tokenizer is read when the first is.

    Attributes:
        model: Whose tokenizer it is.
        revision: Of the model, on the Hub.
        deduped: The Pythia that was trained on the deduplicated Pile.
        tokenizer: Another one that is named for the model, or empty.
    """

    model: str
    revision: str = ""
    deduped: bool = False
    tokenizer: str = ""

    def __call__(self, messages: list[dict[str, Any]]) -> str:
        """One text.

        Args:
            messages: With ``role`` and ``content`` each.

        Raises:
            ModelError: The tokenizer has no template, or its template refuses the messages.
        """
        label = model_label(self.model, self.revision, self.deduped)
        try:
            text: str = _tokenizer(self).apply_chat_template(messages, tokenize=False)  # type: ignore[assignment]
        except (ValueError, TypeError, TemplateError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ModelError(
                f"the tokenizer of model {label} cannot make text of a chat ({reason}): name one "
                "that has a chat template with --tokenizer, or a column of text with --text-column"
            ) from error
        return text


@functools.lru_cache(maxsize=2)
def _tokenizer(template: ChatTemplate) -> PreTrainedTokenizerBase:
    label = model_label(template.model, template.revision, template.deduped)
    location = locate(template.model, template.revision, template.deduped, weights=False)
    return read_tokenizer(label, location, template.tokenizer)
