"""The tables of four studies, as lists of configurations. The first row is always the original.

`group_size` and `rank` are what the caller chooses for the rows that have groups and factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from zqfp_convert.compare.configuration import ActivationScale, Configuration, Solver
from zqfp_convert.errors import OptionError

ROW = 0
SOLVERS: dict[Solver, str] = {"round": "rounding", "gptq": "GPTQ"}
SMOOTH = 0.5  # SmoothQuant's alpha for most models (arXiv:2211.10438, section 5.1)
ORIGINAL = Configuration(section="original", label="W16A16", solver="round")


def zeroquant_fp(group_size: int, rank: int) -> list[Configuration]:
    """Wu et al., "ZeroQuant-FP" (arXiv:2307.09782): integers against floats, M1 and M2, LoRC.

    GPTQ throughout. M1 and M2 are as printed there, which makes M2 clip; `M2 floor` rounds the
    other way and never clips.
    """
    base = Configuration(group_size=group_size)
    rows = [ORIGINAL]
    for section, integer, real in (("W8A8", "int8", "e4m3"), ("W4A8", "int4", "e2m1")):
        for label, weights, activations in (
            ("INT-INT", integer, "int8"),
            ("INT-FP", integer, "e4m3"),
            ("FP-FP", real, "e4m3"),
        ):
            row = replace(base, section=section, label=label)
            rows.append(replace(row, weights=weights, activations=activations))
    fp4 = replace(base, weights="e2m1", activations="e4m3")
    for section, lorc in (("scales of W4A8 FP-FP", 0), ("… with LoRC", rank)):
        here = replace(fp4, section=section, rank=lorc)
        rows += [
            replace(here, label="free"),
            replace(here, label="M1", scales="m1"),
            replace(here, label="M2", scales="m2"),
            replace(here, label="M2 floor", scales="m2", scale_rounding="floor"),
        ]
    for label, lorc in (("", 0), (" with LoRC", rank)):
        here = replace(fp4, section="E2M1 against E3M0", rank=lorc)
        rows += [
            replace(here, label=f"E2M1{label}"),
            replace(here, label=f"E3M0{label}", weights="e3m0"),
        ]
    return rows


def fp8_formats(group_size: int, rank: int) -> list[Configuration]:
    """Shen et al. (arXiv:2309.14592): the 8-bit formats, dynamic and static, one scale a row.

    Rounding only; INT8 with SmoothQuant besides. `mixed` is E4M3 activations and E3M4 weights.
    """
    rows = [ORIGINAL]
    pairs = {
        "E5M2": ("e5m2", "e5m2"),
        "E4M3": ("e4m3", "e4m3"),
        "E3M4": ("e3m4", "e3m4"),
        "mixed": ("e3m4", "e4m3"),
        "INT8": ("int8", "int8"),
        "INT8 asymmetric": ("int8", "int8-asym"),
    }
    base = Configuration(solver="round", group_size=ROW)
    kinds: dict[str, ActivationScale] = {
        "dynamic, per token": "token",
        "static, per tensor": "tensor",
    }
    for section, scale in kinds.items():
        here = replace(base, section=section, activation_scale=scale)
        for label, (weights, activations) in pairs.items():
            rows.append(replace(here, label=label, weights=weights, activations=activations))
        smooth = replace(here, weights="int8", activations="int8", smooth=SMOOTH)
        rows.append(replace(smooth, label="INT8 SmoothQuant"))
    return rows


def zeroquant_v2(group_size: int, rank: int) -> list[Configuration]:
    """Yao et al., "ZeroQuant-V2" (arXiv:2303.08302): sensitivity, methods, group sizes, LoRC.

    `distilled` is layer-wise (ZQ-Local there); distilling the whole model is not among them.
    """
    rows = [ORIGINAL]
    base = Configuration(solver="round", group_size=ROW)
    for bits in (8, 4):
        for kind in ("", "-asym"):
            here = replace(base, section="weights alone", weights=f"int{bits}{kind}")
            rows.append(replace(here, label=f"W{bits}A16{' asymmetric' if kind else ''}"))
    for kind in ("", "-asym"):
        here = replace(base, section="activations alone", activations=f"int8{kind}")
        rows.append(replace(here, label=f"W16A8{' asymmetric' if kind else ''}"))
    methods: dict[str, tuple[Solver, int]] = {
        "rounding": ("round", 0),
        "GPTQ": ("gptq", 0),
        "distilled": ("distill", 0),
        "rounding, LoRC": ("round", rank),
        "GPTQ, LoRC": ("gptq", rank),
    }
    for section, activations in (("W4A16", "none"), ("W4A8", "int8-asym")):
        for groups, size in (("row", ROW), (f"groups of {group_size}", group_size)):
            for label, (solver, lorc) in methods.items():
                here = replace(base, section=f"{section}, {groups}", label=label)
                here = replace(here, weights="int4-asym", activations=activations)
                rows.append(replace(here, group_size=size, solver=solver, rank=lorc))
    return rows


def mx(group_size: int, rank: int) -> list[Configuration]:
    """OCP Microscaling formats (Rouhani et al., arXiv:2310.10537) and NVFP4, beside E2M1 with M2.

    Weights alone and with MXFP8 activations; E2M1 with E4M3 activations for each token.
    """
    rows = [ORIGINAL]
    formats = {"MXFP8": "mxfp8", "MXFP4": "mxfp4", "NVFP4": "nvfp4"}
    for section, activations in (("weights alone", "none"), ("8-bit activations", "mxfp8")):
        for solver, name in SOLVERS.items():
            here = Configuration(section=section, solver=solver, activations=activations)
            for label, weights in formats.items():
                rows.append(replace(here, label=f"{label}, {name}", weights=weights))
            own = "none" if activations == "none" else "e4m3"
            here = replace(here, weights="e2m1", scales="m2", scale_rounding="floor")
            here = replace(here, activations=own, group_size=group_size)
            rows.append(replace(here, label=f"E2M1 M2 floor, {name}"))
    return rows


PRESETS: dict[str, Callable[[int, int], list[Configuration]]] = {
    "zeroquant-fp": zeroquant_fp,
    "fp8-formats": fp8_formats,
    "zeroquant-v2": zeroquant_v2,
    "mx": mx,
}


def preset(name: str, group_size: int, rank: int) -> list[Configuration]:
    """The configurations of the preset of that name.

    Raises:
        OptionError: there is none, or a group size or rank that no configuration admits.
    """
    if name not in PRESETS:
        raise OptionError(
            "--preset", name, needed="one of " + ", ".join(PRESETS), do="Give one of these."
        )
    return PRESETS[name](group_size, rank)
