"""What was measured, and the figures that follow from it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from zqfp_convert.bench.workload import Workload


@dataclass(frozen=True)
class Figures:
    """Of one model.

    Attributes:
        weight_bytes: of all parameters and buffers.
        held_bytes: GPU memory that it took to load, its scratch buffer included; None on the CPU.
        prefill: tokens a second, by the length of the prompt.
        decode: tokens a second.
        queued: share of the time of decoding after which the host had asked for all; near 1, it is
            the host that limits.
        read: bytes read for a decoded token, by kind.
        compiled: whether its steps were compiled.
    """

    weight_bytes: int
    held_bytes: int | None
    prefill: dict[int, float]
    decode: float
    queued: float
    read: dict[str, int]
    compiled: bool

    @property
    def read_bytes(self) -> int:
        """Bytes read for a decoded token."""
        return sum(self.read.values())


@dataclass(frozen=True)
class Benchmark:
    """Of a packed model and, where it was measured, the bfloat16 one.

    Attributes:
        device: its name.
        versions: of torch and transformers.
        bandwidth: bytes a second that the device reads.
        original: what the bfloat16 model is; None where there is none.
        notes: what a reader has to know.
    """

    device: str
    versions: dict[str, str]
    workload: Workload
    bandwidth: float
    packed: Figures
    bf16: Figures | None
    original: str | None
    notes: list[str] = field(default_factory=list)

    def share(self, figures: Figures) -> float:
        """What share of the read bandwidth decoding reaches."""
        return figures.read_bytes * figures.decode / self.bandwidth

    def ratios(self) -> dict[str, Any] | None:
        """How many times faster the packed model is, and how many times smaller."""
        ours, theirs = self.packed, self.bf16
        if theirs is None:
            return None
        held = None
        if ours.held_bytes and theirs.held_bytes:
            held = theirs.held_bytes / ours.held_bytes
        return {
            "prefill": {n: ours.prefill[n] / theirs.prefill[n] for n in ours.prefill},
            "decode": ours.decode / theirs.decode,
            "weight_bytes": theirs.weight_bytes / ours.weight_bytes,
            "held_bytes": held,
            "read_bytes": theirs.read_bytes / ours.read_bytes,
        }

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""

        def of(figures: Figures | None) -> dict[str, Any] | None:
            if figures is None:
                return None
            shares = {"read_bytes": figures.read_bytes, "bandwidth_share": self.share(figures)}
            return asdict(figures) | shares

        return {
            "device": self.device,
            "versions": self.versions,
            "workload": asdict(self.workload),
            "read_bandwidth": self.bandwidth,
            "packed": of(self.packed),
            "bf16": of(self.bf16),
            "original": self.original,
            "ratios": self.ratios(),
            "notes": self.notes,
        }
