"""Writes text with a packed model, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import torch
from transformers import TextIteratorStreamer

from zqfp_convert.checkpoint.source import hub
from zqfp_convert.model.tokenizer import tokenizer_of
from zqfp_convert.runtime.loader import load


def generate(
    checkpoint: str | Path,
    prompt: str,
    *,
    tokens: int = 100,
    temperature: float = 0.8,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Iterator[str]:
    """Yield the prompt's continuation as it is written.

    Args:
        checkpoint: a packed checkpoint's folder, or a repository on the Hub.
        prompt: text to go on from; an empty one starts from the begin-of-text token.
        tokens: how many to write at most.
        temperature: of the sampling; 0 always takes the likeliest token.
        seed: of the sampling.
        device: where to run.

    Raises:
        ZqfpError: what `load` raises, or there is no tokenizer.
    """
    folder = hub.fetch(checkpoint)
    tokenizer = tokenizer_of(folder)
    model = load(folder, device=device)
    first = model.config.get_text_config().bos_token_id
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].long()
    if ids.numel() == 0:
        ids = torch.tensor([[first if first is not None else 0]])
    ids = ids.to(model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {}
    failure: list[BaseException] = []

    def work() -> None:
        try:
            torch.manual_seed(seed)
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                streamer=streamer,
                **(sampling or {"do_sample": False}),
            )
        except BaseException as error:  # handed to the reader of the stream
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]
