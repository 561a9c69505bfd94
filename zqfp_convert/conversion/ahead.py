"""Reads what is needed next while the last is computed with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from zqfp_convert.checkpoint.shards import Shards

PAGE = 4096  # bytes, or fewer than a page of memory has


def read_ahead(shards: Shards, groups: Sequence[list[str]]) -> Iterator[dict[str, Tensor]]:
    """The named tensors of each group; those of the next one are being read meanwhile."""
    if not groups:
        return
    # As many threads as here: how a sum is split up among them decides over its last bits.
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, "read", torch.set_num_threads, (threads,)) as pool:
        reading = pool.submit(_read, shards, groups[0])
        for following in [*groups[1:], None]:
            found = reading.result()
            if following is not None:
                reading = pool.submit(_read, shards, following)
            yield found


def _read(shards: Shards, names: list[str]) -> dict[str, Tensor]:
    tensors = shards.read(names)
    for tensor in tensors.values():  # mapped files are read where they are touched
        tensor.contiguous().flatten().view(torch.uint8)[::PAGE].sum()
    return tensors
