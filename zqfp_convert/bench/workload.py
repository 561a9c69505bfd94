"""What is measured: lengths of prompts, and how much is written after how much context."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from transformers import PretrainedConfig

from zqfp_convert.errors import OptionError


@dataclass(frozen=True)
class Workload:
    """Lengths in tokens, of a batch of one.

    Attributes:
        prompts: of the prompts to prefill.
        context: already in the cache when decoding begins.
        new_tokens: to decode.
        repeats: how often each is measured; the median counts.
    """

    prompts: tuple[int, ...] = (8192, 1024)
    context: int = 1024
    new_tokens: int = 64
    repeats: int = 5

    @classmethod
    def fitting(
        cls,
        config: PretrainedConfig,
        prompts: tuple[int, ...] = (),
        context: int | None = None,
        new_tokens: int = new_tokens,
        repeats: int = repeats,
    ) -> Workload:
        """What is asked for; the usual lengths, as far as a model's positions go, where nothing is.

        Raises:
            OptionError: as `check`.
        """
        most = _positions(config)
        if not prompts:
            prompts = tuple(dict.fromkeys(min(length, most) for length in cls.prompts))
        if context is None:
            context = max(1, min(cls.context, most - new_tokens))
        chosen = cls(tuple(dict.fromkeys(prompts)), context, new_tokens, repeats)
        chosen.check(config)
        return chosen

    def check(self, config: PretrainedConfig) -> None:
        """Hold the lengths to what a model can take.

        Raises:
            OptionError: a length below 1, or beyond the model's positions.
        """
        for option, value in (
            *(("prompt-tokens", length) for length in self.prompts),
            ("context", self.context),
            ("new-tokens", self.new_tokens),
            ("repeats", self.repeats),
        ):
            if value < 1:
                raise OptionError(
                    option, str(value), needed="1 or more", do=f"Give another --{option}."
                )
        most = _positions(config)
        for length in self.prompts:
            if length > most:
                raise OptionError(
                    "prompt-tokens",
                    f"{length}",
                    needed=f"at most {most}, the positions that the model has",
                    do="Give shorter --prompt-tokens.",
                )
        if self.context + self.new_tokens > most:
            raise OptionError(
                "context and new-tokens",
                f"{self.context} + {self.new_tokens}",
                needed=f"at most {most} together, the positions that the model has",
                do="Give a shorter --context or fewer --new-tokens.",
            )


def _positions(config: PretrainedConfig) -> int:
    """How many tokens a model can take."""
    most: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return sys.maxsize if most is None else most
