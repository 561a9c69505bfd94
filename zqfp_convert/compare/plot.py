"""Draws a comparison: each configuration's KL to the original, on a logarithmic axis."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from zqfp_convert.compare.study import Study
from zqfp_convert.errors import OptionError

SUFFIXES = (".png", ".svg", ".pdf")
LEAST = 1e-5  # nats: what is drawn for a configuration that costs nothing


def check(path: Path) -> None:
    """Hold a plot's file to what can be written.

    Raises:
        OptionError: another type, no such folder, or no matplotlib.
    """
    where = f"--plot {path}"
    if path.suffix not in SUFFIXES or path.is_dir() or not path.absolute().parent.is_dir():
        raise OptionError(
            where,
            "not a file that can be drawn to",
            needed=f"a name that ends in {', '.join(SUFFIXES)}, in a folder that exists",
            do="Give another one.",
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError(
            where,
            "the package 'matplotlib' is not installed",
            needed="the extra that draws plots",
            do="pip install 'zqfp-convert[report]', or leave the option out.",
        )


def draw(study: Study, path: Path) -> None:
    """Write the plot of a comparison to a file that `check` has passed."""
    from matplotlib.figure import Figure

    rows = [row for row in study.rows if row.figures[0].kl.mean > 0]
    height = 1.2 + 0.27 * len(rows)
    figure = Figure(figsize=(8.0, height), layout="constrained")
    axes = figure.subplots()
    places = [-number for number in range(len(rows))]
    for index, text in enumerate(study.texts):
        values = [max(row.figures[index].kl.mean, LEAST) for row in rows]
        halves = [row.figures[index].kl.half or 0.0 for row in rows]
        bars = [
            [min(half, 0.9 * value) for half, value in zip(halves, values, strict=True)],
            halves,
        ]
        axes.errorbar(values, places, xerr=bars, fmt="o", markersize=4, label=text.name)
    names = [f"{row.configuration.section}: {row.configuration.label}" for row in rows]
    axes.set_yticks(places, names)
    axes.set_xscale("log")
    axes.set_xlabel("KL(original ‖ quantized), nats a token, with 95 % interval")
    axes.set_title(study.plan.parts.source.folder.name)
    axes.grid(axis="x", which="both", alpha=0.3)
    if len(study.texts) > 1:
        axes.legend()
    figure.savefig(path)
