"""What a report tells, gathered from a checkpoint's descriptions: sizes, errors, spans, experts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median, quantiles
from typing import Any

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.coverage import Coverage, coverage
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.report.wording import starred

NUMBERED = re.compile(r"^(?P<above>.*?)\.(?P<block>\d+)\.(?P<place>.+)$")
# What the format leaves open, in `quantization_config`: the keys and their kinds that are shown.
RECORDED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "calibration": {"source": str, "samples": int, "seq_len": int},
    "tuning": {"kl_before": (int, float), "kl_after": (int, float), "kept": bool},
    "source": {"name": str, "repository": (str, type(None)), "card": dict},
    "made_on": {},
}
CODES, SCALES, FACTORS, OTHERS = "codes", "scales", "low-rank factors", "not quantized"


@dataclass(frozen=True)
class Layer:
    """What the manifest says of a quantized linear; errors are relative, 0.05 being 5%.

    Attributes:
        block: the number of its decoder block; kind: its place there, stars for experts' numbers.
        bits: a weight, scales and low-rank factors included.
        output_error: None without calibration; activation_error: None where it was not measured.
        tokens: that an expert was calibrated on; None for other layers.
    """

    name: str
    block: int
    kind: str
    rows: int
    columns: int
    rank: int
    bits: float
    span: int | None
    raised: int
    weight_error: float
    output_error: float | None
    activation_error: float | None
    tokens: int | None
    pooled: bool
    damping_retries: int

    @property
    def weights(self) -> int:
        """N K."""
        return self.rows * self.columns

    @property
    def error(self) -> float:
        """Of its outputs, or of its weights where that is not known."""
        return self.weight_error if self.output_error is None else self.output_error


@dataclass(frozen=True)
class Kind:
    """Layers of one kind, such as all `mlp.down_proj`: the numbers of one line of a table."""

    name: str
    layers: tuple[Layer, ...]

    @property
    def weights(self) -> int:
        """How many weights they have together."""
        return sum(layer.weights for layer in self.layers)

    @property
    def bits(self) -> float:
        """A weight, over all of them."""
        return sum(layer.bits * layer.weights for layer in self.layers) / self.weights

    @property
    def span(self) -> int | None:
        """The largest."""
        return max((layer.span for layer in self.layers if layer.span is not None), default=None)

    @property
    def worst(self) -> Layer:
        """The one with the largest error."""
        return max(self.layers, key=lambda layer: layer.error)

    def middle(self, of: Callable[[Layer], float | None]) -> float | None:
        """The median of what layers have, or None where none has it."""
        return middle([of(layer) for layer in self.layers])


@dataclass(frozen=True)
class Facts:
    """A checkpoint as a report sees it.

    Attributes:
        name: of its folder, or of its repository.
        architecture: the model's class; layers: the quantized linears, in the manifest's order.
        sizes: bytes of the shards by what they are for; bytes_before: of the source, if on record.
        quantization: `quantization_config`; what of `RECORDED` is not there is None.
        coverage: of experts, by their names on disk.
        evaluation: what `evaluate` found, as its JSON; None if it was not run.
    """

    name: str
    architecture: str
    layers: tuple[Layer, ...]
    sizes: dict[str, int]
    bytes_before: int | None
    quantization: dict[str, Any]
    coverage: dict[str, Coverage]
    evaluation: dict[str, Any] | None

    @classmethod
    def of(
        cls, packed: PackedCheckpoint, name: str, evaluation: dict[str, Any] | None = None
    ) -> Facts:
        """The facts of a checkpoint, and of its evaluation if there is one."""
        entries = packed.manifest["layers"]
        layers = tuple(_layer(each, entry, packed.bits(each)) for each, entry in entries.items())
        named = packed.config.get("architectures")
        architectures = named if isinstance(named, list) and named else None
        quantization = packed.quantization | {
            key: _recorded(packed.quantization.get(key), kinds) for key, kinds in RECORDED.items()
        }
        before = (quantization["source"] or {}).get("bytes")
        return cls(
            name,
            str(architectures[0] if architectures else packed.config.get("model_type", "model")),
            layers,
            _sizes(packed),
            before if isinstance(before, int) else None,
            quantization,
            coverage(entries),
            evaluation,
        )

    @property
    def bytes_after(self) -> int:
        """Of all tensors."""
        return sum(self.sizes.values())

    @property
    def weights(self) -> int:
        """How many are quantized."""
        return sum(layer.weights for layer in self.layers)

    @property
    def bits(self) -> float:
        """For each quantized weight."""
        return sum(layer.bits * layer.weights for layer in self.layers) / max(1, self.weights)

    @property
    def calibrated(self) -> bool:
        """Whether errors of outputs are known."""
        return any(layer.output_error is not None for layer in self.layers)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """The layers by kind, in the order of the manifest."""
        of: dict[str, list[Layer]] = {}
        for layer in self.layers:
            of.setdefault(layer.kind, []).append(layer)
        return tuple(Kind(name, tuple(layers)) for name, layers in of.items())

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """The numbers of the blocks."""
        return tuple(sorted({layer.block for layer in self.layers}))

    @cached_property
    def grid(self) -> dict[tuple[str, int], float]:
        """The error by kind and block: of several experts the root of their mean square."""
        of: dict[tuple[str, int], list[float]] = {}
        for layer in self.layers:
            of.setdefault((layer.kind, layer.block), []).append(layer.error)
        return {
            place: math.sqrt(sum(error**2 for error in errors) / len(errors))
            for place, errors in of.items()
        }

    @property
    def spans(self) -> dict[int, int]:
        """How many layers have which span; empty for free scales."""
        found = Counter(layer.span for layer in self.layers if layer.span is not None)
        return dict(sorted(found.items()))

    @cached_property
    def tokens(self) -> dict[int, list[int]]:
        """How many tokens each expert of a block was calibrated on; empty without experts."""
        found: dict[int, dict[str, int]] = {}
        for layer in self.layers:
            if layer.tokens is not None:
                found.setdefault(layer.block, {})[layer.name.rpartition(".")[0]] = layer.tokens
        return {block: list(found[block].values()) for block in sorted(found)}

    def worst(self, count: int) -> list[Layer]:
        """The layers with the largest errors."""
        return sorted(self.layers, key=lambda layer: -layer.error)[:count]


def spread(values: Sequence[int]) -> tuple[float, float, float, float, float]:
    """The least, the quarter, the middle, three quarters, and the most of some values."""
    if len(values) < 2:
        only = float(values[0])
        return only, only, only, only, only
    low, mid, high = quantiles(values, n=4, method="inclusive")
    return float(min(values)), low, mid, high, float(max(values))


def middle(values: Sequence[float | None]) -> float | None:
    """The median of those values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _recorded(value: object, kinds: dict[str, type | tuple[type, ...]]) -> dict[str, Any] | None:
    """A value that has those keys, or None."""
    if not isinstance(value, dict):
        return None
    right = all(isinstance(value.get(key, ...), kind) for key, kind in kinds.items())
    return value if right else None


def _layer(name: str, entry: dict[str, Any], bits: float) -> Layer:
    found = NUMBERED.match(name)
    place = name if found is None else found["place"]
    rows, columns = entry["shape"]
    return Layer(
        name,
        0 if found is None else int(found["block"]),
        starred(place),
        rows,
        columns,
        entry["rank"],
        bits,
        entry["span"],
        entry["raised_groups"],
        entry["weight_error"],
        entry["output_error"],
        entry.get("activation_error"),
        entry.get("tokens"),
        bool(entry.get("pooled")),
        int(entry.get("damping_retries", 0)),
    )


def _sizes(packed: PackedCheckpoint) -> dict[str, int]:
    sizes = dict.fromkeys((CODES, SCALES, FACTORS, OTHERS), 0)
    for name, info in packed.shards.tensors.items():
        if layout.layer_of(name) is None:
            part = OTHERS
        elif name.endswith(layout.PACKED):
            part = CODES
        elif name.endswith((layout.LORC_A, layout.LORC_B, layout.LORC_SCALE)):
            part = FACTORS
        else:
            part = SCALES
        sizes[part] += info.bytes
    return sizes
