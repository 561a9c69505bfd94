"""humming-kernels as a contender: E2M1 weights, groups of 128, E8M0 and row scales, FP8 tokens.

`pip install humming-kernels`. It compiles its kernels with NVRTC as they are needed, 2 s each, all
cores at once, for one weight shape and one tile. `Humming` takes the tile that its own heuristics
choose for the number of tokens; `TunedHumming` searches, among all tiles that these heuristics
choose for any number of tokens, in both weight layouts it has, and variants of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import torch
from peers import GROUP, Problem, random_inputs
from timing import Replay, medians
from torch import Tensor

COMPUTE = json.dumps({"gemm_type": "dense"})
Tile = dict[str, Any]  # a tuning configuration, in humming's words


class Layout:
    """The weight in one of humming's layouts, in copies, and the call of a kernel on it."""

    def __init__(self, problem: Problem, copies: int, packed_k: bool | None) -> None:
        from humming.schema import HummingInputSchema, HummingWeightSchema
        from humming.transform import prepare_layer_config, transform_humming_tensors

        config = prepare_layer_config(
            shape_n=problem.rows,
            shape_k=problem.columns,
            weight_schema=HummingWeightSchema(
                b_dtype="float4e2m1",
                bs_dtype="float8e8m0",
                weight_scale_group_size=GROUP,
                weight_scale_2_type="channel",
            ),
            input_schema=HummingInputSchema(a_dtype="float8e4m3"),
            torch_dtype=torch.bfloat16,
        )
        if packed_k is not None:
            config = dataclasses.replace(config, use_packed_k_layout=packed_k)
        self.config = config
        tensors = transform_humming_tensors(
            config,
            {
                "weight": problem.packed.view(torch.int32),
                "weight_scale": problem.exponents.view(torch.float8_e8m0fnu),
                "weight_scale_2": problem.row_scale,
            },
        )
        tensors["locks"] = torch.zeros(2048, dtype=torch.int32, device="cuda")
        self.copies = [tensors]
        for _ in range(copies - 1):
            self.copies.append({name: tensor.clone() for name, tensor in tensors.items()})
        self.bytes = sum(tensor.nbytes for name, tensor in tensors.items() if name != "locks")

    def tile(self, tokens: int) -> Tile:
        """What humming's heuristics choose."""
        from humming.tune import get_heuristics_config

        return dict(get_heuristics_config(self.config, shape_m=tokens))

    def tiles(self) -> list[Tile]:
        """All that they choose for any number of tokens."""
        from humming.tune import get_heuristics_config

        unique = {str(tile): tile for _, _, tile in get_heuristics_config(self.config)}
        return [dict(tile) for tile in unique.values()]

    def kernel(self, tile: Tile) -> Tensor:
        """The compiled kernel of a tile, as `multiply` takes it."""
        from humming.kernel.humming import HummingKernel

        return HummingKernel.prepare_kernels(self.config.to_str(), COMPUTE, tile)

    def multiply(self, kernel: Tensor, copy: int, x: Tensor, scale: Tensor, y: Tensor) -> Tensor:
        from humming import ops

        return ops.launch_kernel(
            configs=kernel, inputs=x, input_scale=scale, outputs=y, **self.copies[copy]
        )


class Humming:
    """humming as it comes: its layout and its tile."""

    name: ClassVar[str] = "humming"
    layouts: ClassVar[tuple[bool | None, ...]] = (None,)  # None: what it takes by itself

    def __init__(self, rows: int, columns: int, copies: int) -> None:
        self.problem = Problem(rows, columns)
        self.made = [Layout(self.problem, copies, packed_k) for packed_k in self.layouts]
        self.chosen = self.made[0]
        self.weight_bytes = self.chosen.bytes
        self.tile: Tile = {}

    @staticmethod
    def size(rows: int, columns: int) -> int:
        return rows * columns // 2

    def work(self, tokens: int) -> list[tuple[Layout, Tile]]:
        """The kernels that will be needed."""
        return [(self.made[0], self.made[0].tile(tokens))]

    def announce(self, tokens: list[int]) -> None:
        """Compile what these numbers of tokens will need, on all cores."""
        compile_all([pair for count in tokens for pair in self.work(count)])

    def prepare(self, tokens: int) -> None:
        self.given = random_inputs(tokens, self.problem.columns)
        self.x, self.scale = self.quantize()
        self.y = torch.empty(tokens, self.problem.rows, dtype=torch.bfloat16, device="cuda")
        self.chosen = self.made[0]
        self.use(self.chosen, self.chosen.tile(tokens))

    def use(self, layout: Layout, tile: Tile) -> None:
        self.chosen, self.tile = layout, tile
        self.kernel = layout.kernel(tile)

    def multiply(self, copy: int) -> Tensor:
        return self.chosen.multiply(self.kernel, copy, self.x, self.scale, self.y)

    def quantize(self) -> tuple[Tensor, Tensor]:
        from humming.forward import may_process_input

        codes, _, scale = may_process_input(self.chosen.config, self.given)
        return codes, scale

    def quantize_and_multiply(self, copy: int) -> Tensor:
        codes, scale = self.quantize()
        return self.chosen.multiply(self.kernel, copy, codes, scale, self.y)

    def error(self) -> float:
        self.y.fill_(torch.nan)
        return self.problem.error(self.multiply(0), self.x.float() * self.scale)


class TunedHumming(Humming):
    """humming with the fastest of many tiles; those that fail or differ are left out."""

    name: ClassVar[str] = "humming-tuned"
    layouts: ClassVar[tuple[bool | None, ...]] = (None, True)

    def work(self, tokens: int) -> list[tuple[Layout, Tile]]:
        return [(layout, tile) for layout in self.made for tile in variants(layout, tokens)]

    def prepare(self, tokens: int) -> None:
        super().prepare(tokens)
        wanted = self.multiply(0).clone()
        best, fastest = (self.chosen, self.tile), float("inf")
        for layout, tile in compile_all(self.work(tokens)):
            try:
                self.use(layout, tile)
                self.y.fill_(torch.nan)
                difference = (self.multiply(0) - wanted).float().norm() / wanted.float().norm()
                if not difference < 0.01:
                    continue
                replay = Replay(self.multiply, min(8, len(layout.copies)), 8)
                time = medians({"": replay}, 3)[""]
            except (RuntimeError, ValueError, AssertionError):
                continue
            if time < fastest:
                best, fastest = (layout, tile), time
        self.use(*best)


def compile_all(work: list[tuple[Layout, Tile]]) -> list[tuple[Layout, Tile]]:
    """Compile kernels that are not compiled yet; returns those that can be."""

    def attempt(pair: tuple[Layout, Tile]) -> bool:
        layout, tile = pair
        try:
            layout.kernel(tile)
        except Exception:  # an assertion, a compiler's message: this tile is not to be had
            return False
        return True

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiles = list(pool.map(attempt, work))
    return [pair for pair, good in zip(work, compiles, strict=True) if good]


def variants(layout: Layout, tokens: int) -> Iterator[Tile]:
    """Tiles worth a try for that many tokens, without repetition."""
    seen = set()
    for tile in [layout.tile(tokens), *fitting(layout, tokens), *changed(layout, tokens)]:
        key = json.dumps(tile, sort_keys=True, default=str)
        if key not in seen and fits(layout, tile):
            seen.add(key)
            yield tile


def fitting(layout: Layout, tokens: int) -> Iterator[Tile]:
    """The heuristics' tiles for other numbers of tokens, unless far too large or too small."""
    for tile in layout.tiles():
        block = tile["block_shape"][0]
        if -(-tokens // block) * block <= max(16, 1.5 * tokens) and block * 16 >= min(tokens, 1536):
            yield tile


def changed(layout: Layout, tokens: int) -> Iterator[Tile]:
    """The heuristics' tile with something else beside its shape."""
    tile = layout.tile(tokens)
    if tokens <= 64:
        for stages in (3, 4, 6):
            for blocks in (1, 2):
                for early in (False, True):
                    yield tile | {
                        "num_stages": stages, "num_ctas_per_sm": blocks, "use_pdl": early,
                    }  # fmt: skip
        return
    for raster in (1, 4, 8):
        for multicast in ({}, {"multi_cast_size_a": 2}, {"multi_cast_size_b": 2}):
            yield tile | {"raster_group_m": raster} | multicast
    yield tile | {"use_stream_k": not tile["use_stream_k"]}
    yield tile | {"use_pdl": True}


def fits(layout: Layout, tile: Tile) -> bool:
    """Whether all its blocks are resident at once, which its stream-K waits for."""
    from humming.config import ComputeConfig, TuningConfig
    from humming.utils.smem import estimate_smem_size_config

    known = {key: value for key, value in tile.items() if key in TuningConfig.get_field_names()}
    try:
        tuning = TuningConfig(**known)
        size = estimate_smem_size_config(layout.config, ComputeConfig(gemm_type="dense"), tuning)
    except (AssertionError, ValueError):
        return False
    shared, reserved = 228 << 10, 1 << 10  # bytes of a multiprocessor, and lost for each block
    return bool((size + reserved) * tuning.num_ctas_per_sm <= shared)
