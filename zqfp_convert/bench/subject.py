"""A model under measurement: its caches, its prompts, and the seconds that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel, StaticCache

from zqfp_convert.bench import attention
from zqfp_convert.bench.workload import Workload

WARM_UPS = 3  # of a compiled step: compiles, captures the CUDA graph, replays it


def _early_launches() -> dict[str, Any]:
    """Lets compiled kernels start before the one ahead has ended, where torch knows how."""
    from torch._inductor import config

    return {"triton.enable_pdl": True} if hasattr(config.triton, "enable_pdl") else {}


class Subject:
    """A model, ready to be timed once it is warm; `[1, M]` tokens at a time.

    Attributes:
        model: measured as it is, in evaluation mode.
        cache: that decoding reads, of as many tokens as context and new tokens together.
        compiled: whether the steps are compiled; known when warm.
    """

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        attention.simplify(model)
        self.model, self.workload, self.compiled = model, workload, False
        self._device = model.device
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._prompts = {length: self._random(length) for length in workload.prompts}
        self._caches = {length: self._cache(length) for length in workload.prompts}
        self._context = self._random(workload.context)
        self.cache = self._cache(workload.context + workload.new_tokens)
        self._token = self._random(1)
        self._prefill: Callable[[Tensor, StaticCache], Tensor] = self._last_logits
        self._step: Callable[[Tensor], Tensor] = self._next_token

    @torch.no_grad()
    def warm_up(self) -> None:
        """Run everything once, first as it is and then compiled, where there are CUDA graphs.

        The kernels of each shape are compiled and loaded in the first pass, outside of any capture.

        Raises:
            TorchDynamoException: the model cannot be compiled; it can be timed all the same.
        """
        self._rehearse(1)
        if self._device.type != "cuda":
            return
        torch._dynamo.mark_static_address(self._token)
        prefill = torch.compile(self._last_logits, fullgraph=True, dynamic=False)
        options = {"triton.cudagraphs": True} | _early_launches()
        step = torch.compile(self._next_token, fullgraph=True, options=options)
        self._prefill, self._step, self.compiled = prefill, step, True
        try:
            self._rehearse(WARM_UPS)
        except TorchDynamoException:
            self._prefill, self._step, self.compiled = self._last_logits, self._next_token, False
            raise

    @torch.no_grad()
    def prefill_seconds(self, length: int) -> float:
        """From a prompt on the device to the logits of its last token, the cache filled."""
        cache = self._caches[length]
        cache.reset()
        self._wait()
        began = time.perf_counter()
        self._prefill(self._prompts[length], cache)
        self._wait()
        return time.perf_counter() - began

    @torch.no_grad()
    def decode_seconds(self) -> tuple[float, float]:
        """For all new tokens, each the likeliest after the one before.

        Returns:
            seconds: until the last one is there.
            queued: until the host had asked for it; as long, where the host is what limits.
        """
        self._fill()
        self._wait()
        began = time.perf_counter()
        for _ in range(self.workload.new_tokens):
            self._advance()
        queued = time.perf_counter() - began
        self._wait()
        return time.perf_counter() - began, queued

    def _rehearse(self, times: int) -> None:
        for length, cache in self._caches.items():
            for _ in range(times):
                cache.reset()
                self._prefill(self._prompts[length], cache)
        for _ in range(times):
            self._fill()
            self._advance()
        self._wait()

    def _fill(self) -> None:
        """Put the context into the cache of decoding."""
        self.cache.reset()
        self._token.copy_(self._last_logits(self._context, self.cache).argmax(-1))

    def _advance(self) -> None:
        if self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        self._token.copy_(self._step(self._token))

    def _last_logits(self, ids: Tensor, cache: StaticCache) -> Tensor:
        logits: Tensor = self.model(
            ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits  # [1, 1, vocabulary]

    def _next_token(self, token: Tensor) -> Tensor:
        return self._last_logits(token, self.cache).argmax(-1)  # [1, 1]

    def _random(self, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(self._vocabulary, (1, length), generator=generator)
        return ids.to(self._device)

    def _cache(self, length: int) -> StaticCache:
        return StaticCache(config=self.model.config, max_cache_len=length)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
