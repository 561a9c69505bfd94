"""One row of a comparison: which formats, scales and solver. Checked when made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from zqfp_convert.compare.formats import ACTIVATIONS, FORMATS, NONE, WEIGHTS
from zqfp_convert.compare.placement import ScaleKind, ScaleRounding
from zqfp_convert.errors import OptionError

Solver = Literal["round", "gptq", "distill"]
ActivationScale = Literal["token", "tensor"]

MAX_RANK = 1024
TEXTS = ("weights", "activations", "activation_scale", "scales", "scale_rounding", "solver")
COUNTS = ("group_size", "rank")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """A way to quantize a model.

    Attributes:
        section, label: what the table calls it.
        weights: one of `formats.WEIGHTS`.
        activations: one of `formats.ACTIVATIONS`.
        activation_scale: `token`: one for each token, found as the model runs; `tensor`: one for
            all, found in calibration. MX formats have their own.
        scales: of the weights; `m1` and `m2` are those of ZeroQuant-FP.
        scale_rounding: to powers of two; `ceil` is as ZeroQuant-FP prints it.
        group_size: weights of a row that share a scale, 0 for the whole row. MX formats and NVFP4
            have their own.
        solver: `round` to nearest, `gptq`, or `distill`: rounding of weights that have been
            trained block by block for that, as in ZeroQuant.
        smooth: SmoothQuant's alpha, 0 to leave it out.
        rank: of the low-rank compensation (LoRC), 0 for none.

    Raises:
        OptionError: a value or a combination that does not exist.
    """

    section: str = ""
    label: str = ""
    weights: str = NONE
    activations: str = NONE
    activation_scale: ActivationScale = "token"
    scales: ScaleKind = "free"
    scale_rounding: ScaleRounding = "ceil"
    group_size: int = 256
    solver: Solver = "gptq"
    smooth: float = 0.0
    rank: int = 0

    def __post_init__(self) -> None:
        admitted: dict[str, tuple[str, ...]] = {
            "weights": WEIGHTS,
            "activations": ACTIVATIONS,
            "activation_scale": get_args(ActivationScale),
            "scales": get_args(ScaleKind),
            "scale_rounding": get_args(ScaleRounding),
            "solver": get_args(Solver),
        }
        for field, choices in admitted.items():
            value = getattr(self, field)
            _require(field, value, value in choices, "one of " + ", ".join(choices))
        _require("group_size", self.group_size, self.group_size >= 0, "a size, or 0 for the row")
        _require("rank", self.rank, 0 <= self.rank <= MAX_RANK, f"0 to {MAX_RANK}")
        _require("smooth", self.smooth, 0 <= self.smooth < 1, "from 0 to less than 1")
        form = FORMATS.get(self.weights)
        plain = form is not None and not form.asymmetric and form.block is None
        _require(
            f"scales {self.scales}",
            f"weights {self.weights}",
            plain or self.scales == "free",
            "scales free, since these weights have none to constrain or constrain their own",
        )
        blocks = self.activations != NONE and FORMATS[self.activations].block is not None
        _require(
            "activation_scale",
            f"tensor, with activations {self.activations}",
            not (blocks and self.activation_scale == "tensor"),
            "token, since the format has a scale for each of its blocks",
        )

    @classmethod
    def parse(cls, text: str) -> Configuration:
        """Read `weights=e2m1,activations=e4m3,scales=m2 …`, as `--configuration` takes it.

        Raises:
            OptionError: not such a list, or what the class raises.
        """
        kinds: dict[str, Callable[[str], Any]] = {
            **dict.fromkeys(TEXTS, str),
            **dict.fromkeys(COUNTS, int),
            "smooth": float,
        }
        given: dict[str, Any] = {"section": "given", "label": text}
        for part in text.replace(",", " ").split():
            key, _, value = part.partition("=")
            key = key.replace("-", "_")
            _require("--configuration", part, key in kinds and bool(value), _grammar(kinds))
            try:
                given[key] = kinds[key](value)
            except ValueError as error:
                raise _wrong("--configuration", part, "a number") from error
        return cls(**given)

    @property
    def observes(self) -> bool:
        """Whether ranges of activations have to be known beforehand."""
        static = self.activations != NONE and self.activation_scale == "tensor"
        return static or self.smooth > 0

    @property
    def solves(self) -> bool:
        """Whether second moments of activations have to be known beforehand."""
        return self.solver == "gptq" and self.weights != NONE

    @property
    def trains(self) -> bool:
        """Whether weights are trained on activations before they are rounded."""
        return self.solver == "distill" and self.weights != NONE

    @property
    def calibrates(self) -> bool:
        """Whether it looks at calibration text at all."""
        return self.observes or self.solves or self.trains

    def unnamed(self) -> Configuration:
        """The same without section and label: equal for equal work."""
        return dataclasses.replace(self, section="", label="")

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


def _grammar(keys: Iterable[str]) -> str:
    return "NAME=VALUE, …, the names being " + ", ".join(keys)


def _require(where: str, found: object, holds: bool, needed: str) -> None:
    if not holds:
        raise _wrong(where, found, needed)


def _wrong(where: str, found: object, needed: str) -> OptionError:
    return OptionError(where, f"{found}", needed=needed, do="Give another one.")
