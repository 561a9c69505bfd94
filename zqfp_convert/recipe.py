"""The recipe: every choice of a conversion in one immutable value.

It is written into the checkpoint, so that what was done can be read off and done again.
It knows nothing of tensors or files.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from zqfp_convert.errors import OptionError

ScaleKind = Literal["free", "m1", "m2"]
ScaleRounding = Literal["ceil", "floor", "nearest", "search"]
Solver = Literal["round", "gptq"]
LowRank = Literal["svd", "hessian"]
FactorFormat = Literal["e4m3", "bf16"]
Codebooks = Literal["e2m1", "pair"]
Rotating = Literal["auto", "residual", "none"]
GroupSize = int | Literal["row"]
Rank = int | Literal["auto"]
RecipeName = Literal["fast", "paper", "best", "max"]

GROUP_SIZES: tuple[GroupSize, ...] = (32, 64, 128, 256, "row")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All choices of a conversion. Make one with `Recipe.named("best", group_size=64)`.

    Raises:
        OptionError: a value is outside what the format or the method admits.
    """

    name: str
    # Scales of the groups of weights.
    scales: ScaleKind = "m2"
    scale_rounding: ScaleRounding = "search"
    group_size: GroupSize = 128
    codebooks: Codebooks = "pair"  # what the codes stand for; of a pair each group has the better
    # The solver that picks the codes.
    solver: Solver = "gptq"
    damping: float = 0.01  # share of the Hessian's mean diagonal that is added to its diagonal
    activation_order: bool = True
    asymmetry: float = 0.5  # how far to aim at the original's outputs instead of the prefix's
    sweeps: int = 3  # of coordinate descent after the solver
    # Low-rank compensation (LoRC).
    rank: Rank = 8  # auto: where it lowers the error more than its bits in the codes would
    low_rank: LowRank = "hessian"
    low_rank_rounds: int = 4  # alternations of fitting the factors and re-solving the codes
    factors: FactorFormat = "e4m3"
    # The model around the weights.
    rotation: Rotating = "auto"  # of the residual stream; auto: where it brings the outputs closer
    balance_norms: bool = True  # take back what gains and the next weights moved between them
    center_norms: bool = True  # fold the mean of each LayerNorm's output into the biases
    ignore: tuple[str, ...] = ("lm_head",)
    # End-to-end tuning against the original's token distributions.
    tune: int = 0  # steps
    tune_samples: int = 256  # windows: those of calibration, more of their text, self-written ones
    # Calibration.
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        patterns = (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore)
        object.__setattr__(self, "ignore", patterns)
        for field, admitted in _ADMITTED.items():
            value = getattr(self, field)
            same = [choice for choice in admitted if choice == value]
            _require(field, value, bool(same) and type(same[0]) is type(value), admitted)
        for field in _WHOLE_NUMBERS:
            _require(
                field, getattr(self, field), type(getattr(self, field)) is int, "a whole number"
            )
        for field in ("damping", "asymmetry"):
            number = isinstance(getattr(self, field), (int, float))
            _require(field, getattr(self, field), number, "a number")
        rule: dict[str, tuple[bool, str]] = {
            "damping": (0 < self.damping < 1, "a number between 0 and 1"),
            "asymmetry": (0 <= self.asymmetry <= 1, "a number from 0 to 1"),
            "sweeps": (self.sweeps >= 0, "a whole number, 0 or more"),
            "rank": (_is_rank(self.rank), "a whole number from 0 to 1024, or auto"),
            "low_rank_rounds": (self.low_rank_rounds >= 0, "a whole number, 0 or more"),
            "tune": (self.tune >= 0, "a whole number, 0 or more"),
            "tune_samples": (self.tune_samples >= 0, "a whole number, 0 or more"),
            "samples": (self.samples >= 1, "a whole number, 1 or more"),
            "seq_len": (self.seq_len >= 2, "a whole number, 2 or more"),
            "seed": (0 <= self.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
        }
        for field, (holds, needed) in rule.items():
            _require(field, getattr(self, field), holds, needed)
        if self.scales == "free" and self.scale_rounding in ("ceil", "floor"):
            raise OptionError(
                "scale_rounding",
                f"{self.scale_rounding!r} with free scales",
                needed="'nearest' or 'search' (free scales are rounded to no power of two)",
                do="Choose scales m1 or m2, or another rounding.",
            )

        searched = self.scales != "free" and self.scale_rounding == "search"
        if self.codebooks == "pair" and not searched:
            raise OptionError(
                "codebooks",
                f"'pair' with {self.scales} scales and rounding {self.scale_rounding!r}",
                needed="scales m1 or m2, and rounding 'search', which finds each group's codebook",
                do="Choose scales m2 with rounding search (as recipe best has), or codebooks e2m1.",
            )

    @classmethod
    def named(cls, name: str, **choices: Any) -> Recipe:
        """The recipe of that name, with some of its choices replaced (`None` keeps the recipe's).

        Raises:
            OptionError: an unknown name or choice, or a value that is not admitted.
        """
        _require("recipe", name, name in _NAMED, tuple(_NAMED))
        return cls(name=name, **_NAMED[name]).changed(**choices)

    def changed(self, **choices: Any) -> Recipe:
        """The same recipe with some of its choices replaced (`None` keeps the recipe's).

        Free scales know no rounding to powers of two: with them `ceil` and `floor` give way to
        `nearest`, unless a rounding is named too. A pair of codebooks, which only a search can
        choose between, gives way to E2M1 unless it is named.

        Raises:
            OptionError: an unknown choice, or a value that is not admitted.
        """
        fields = {field.name for field in dataclasses.fields(self)} - {"name"}
        for choice in choices:
            _require("recipe option", choice, choice in fields, tuple(sorted(fields)))
        given = {key: value for key, value in choices.items() if value is not None}
        if given.get("scales") == "free" and self.scale_rounding in ("ceil", "floor"):
            given.setdefault("scale_rounding", "nearest")
        if given.get("scales") == "free" or given.get("scale_rounding", "search") != "search":
            given.setdefault("codebooks", "e2m1")
        return dataclasses.replace(self, **given)

    @property
    def needs_calibration(self) -> bool:
        """Whether any part of the recipe looks at activations."""
        looks = self.solver == "gptq" or self.sweeps > 0 or self.asymmetry > 0
        looks = looks or self.balance_norms or self.center_norms or self.rotation != "none"
        return looks or self.tune > 0 or (self.rank != 0 and self.low_rank == "hessian")

    def ignores(self, layer: str) -> bool:
        """Whether a pattern of `ignore` matches the layer's dotted name or a dotted end of it.

        Patterns are shell globs: `lm_head`, `down_proj`, `model.layers.0.*`, `*.3.mlp.*`.
        """
        parts = layer.split(".")
        ends = [".".join(parts[start:]) for start in range(len(parts))]
        return any(fnmatchcase(end, pattern) for end in ends for pattern in self.ignore)

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values, as written into the checkpoint."""
        return {**dataclasses.asdict(self), "ignore": list(self.ignore)}


_NAMED: dict[str, dict[str, Any]] = {
    # No calibration: each weight goes to the nearest code under scales that never clip.
    "fast": {
        "scale_rounding": "floor",
        "codebooks": "e2m1",
        "solver": "round",
        "activation_order": False,
        "asymmetry": 0.0,
        "sweeps": 0,
        "rank": 0,
        "low_rank": "svd",
        "low_rank_rounds": 0,
        "rotation": "none",
        "balance_norms": False,
        "center_norms": False,
    },
    # ZeroQuant-FP (arXiv:2307.09782) as printed: GPTQ, groups of 256, scales rounded up to a power
    # of two, LoRC by the singular value decomposition of the error, its factors in 8 bits.
    "paper": {
        "scales": "m1",
        "scale_rounding": "ceil",
        "group_size": 256,
        "codebooks": "e2m1",
        "activation_order": False,
        "asymmetry": 0.0,
        "sweeps": 0,
        "low_rank": "svd",
        "low_rank_rounds": 0,
        "rotation": "none",
        "balance_norms": False,
        "center_norms": False,
    },
    "best": {},
    "max": {"tune": 400},
}

_WHOLE_NUMBERS = (
    "sweeps",
    "low_rank_rounds",
    "tune",
    "tune_samples",
    "samples",
    "seq_len",
    "seed",
)
_ADMITTED: dict[str, tuple[Any, ...]] = {
    "scales": get_args(ScaleKind),
    "scale_rounding": get_args(ScaleRounding),
    "group_size": GROUP_SIZES,
    "codebooks": get_args(Codebooks),
    "rotation": get_args(Rotating),
    "solver": get_args(Solver),
    "low_rank": get_args(LowRank),
    "factors": get_args(FactorFormat),
}


def _is_rank(value: object) -> bool:
    return value == "auto" or (type(value) is int and 0 <= value <= 1024)


def _require(field: str, value: object, holds: bool, needed: str | tuple[Any, ...]) -> None:
    if not holds:
        text = needed if isinstance(needed, str) else "one of " + ", ".join(map(str, needed))
        raise OptionError(field, f"{value!r}", needed=text, do=f"Give another {field}.")
