"""Numbers in a model's configuration, which not every model has, or not one for all its blocks."""

from __future__ import annotations

from transformers import PreTrainedModel


def configured(model: PreTrainedModel, field: str) -> int | None:
    """A field of the configuration of a model's decoder; None where there is no such number."""
    try:
        value = getattr(model.config.get_text_config(decoder=True), field, None)
    except Exception:  # transformers refuses fields that differ from block to block
        return None
    return value if isinstance(value, int) else None
