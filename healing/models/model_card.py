"""What a stored model says of itself."""

from __future__ import annotations

from huggingface_hub import ModelCard


def model_card(title: str, text: str) -> ModelCard:
    """A model card without licence data: the weights that it derives from have their own.

    Args:
        title: Heading.
        text: Markdown below it.
    """
    return ModelCard(f"---\n{{}}\n---\n# {title}\n\n{text}\n")
