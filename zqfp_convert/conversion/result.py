"""What a conversion made, and whom it tells how far it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zqfp_convert.checkpoint.coverage import Coverage, coverage
from zqfp_convert.distill.train import Outcome
from zqfp_convert.plan import Plan

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the weights done so far, and their total."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion made.

    Attributes:
        out: the checkpoint's folder.
        plan: what was planned.
        layers: the manifest's entry for each quantized linear.
        changed: tensors that differ from the source's, with the kind of change.
        bits: for each quantized weight, scales and low-rank factors included.
        bytes_after: of all weights on disk.
        seconds: wall time.
        host_peak, device_peak: bytes above what there was before, of all processes of this host and
            of the fullest GPU; None where the system does not tell, and where no GPU is used.
        calibration: text, number and length of the windows used; None where none were needed.
        tuning: what end-to-end tuning did; None without.
    """

    out: Path
    plan: Plan
    layers: dict[str, dict[str, Any]]
    changed: dict[str, str]
    bits: float
    bytes_after: int
    seconds: float
    host_peak: int | None
    device_peak: int | None
    calibration: dict[str, Any] | None
    tuning: Outcome | None = None

    @property
    def ranks(self) -> dict[int, int]:
        """How many layers have which rank of low-rank compensation, by rank."""
        return dict(sorted(Counter(entry["rank"] for entry in self.layers.values()).items()))

    @property
    def coverage(self) -> dict[str, Coverage]:
        """How well calibration covered the experts of each block; empty without experts."""
        return coverage(self.layers)

    def worst(self, count: int = 5) -> list[tuple[str, dict[str, Any]]]:
        """The layers with the largest error of their outputs (of their weights, where unknown)."""

        def error(entry: dict[str, Any]) -> float:
            known = entry["output_error"]
            return float(entry["weight_error"] if known is None else known)

        return sorted(self.layers.items(), key=lambda item: -error(item[1]))[:count]

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON values."""
        return {
            "out": str(self.out),
            "bytes_before": self.plan.bytes_before,
            "bytes_after": self.bytes_after,
            "bits": self.bits,
            "layers": len(self.layers),
            "ranks": {str(rank): count for rank, count in self.ranks.items()},
            "worst": dict(self.worst()),
            "damping_retries": {
                name: entry["damping_retries"]
                for name, entry in self.layers.items()
                if entry.get("damping_retries")
            },
            "experts": {name: asdict(one) for name, one in self.coverage.items()},
            "left_alone": self.plan.left_alone,
            "changed": len(self.changed),
            "calibration": self.calibration,
            "rotation": self.plan.recipe.rotation,
            "tuning": None
            if self.tuning is None
            else {
                "kl_before": self.tuning.kl_before,
                "kl_after": self.tuning.kl_after,
                "kept": self.tuning.kept,
                "roundings": self.tuning.roundings,
                "minutes": round(self.tuning.seconds / 60, 3),
            },
            "seconds": round(self.seconds, 3),
            "host_memory": {"estimated": self.plan.host_memory, "measured": self.host_peak},
            "device_memory": {"estimated": self.plan.device_memory, "measured": self.device_peak},
        }
