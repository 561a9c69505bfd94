"""The report in one picture, for model cards: size, errors, and how close it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zqfp_convert.checkpoint.output.disk import writing
from zqfp_convert.report.facts import CODES, FACTORS, OTHERS, SCALES, Facts, spread
from zqfp_convert.report.wording import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GRAY = "#1d5dbd", "#b4530a", "#97a1b1"
TEXT, MUTED = "#1b2230", "#566073"
COLORS = {CODES: BLUE, SCALES: "#8eaede", FACTORS: ORANGE, OTHERS: GRAY}
DOTS = 150  # an inch
NUMBERED = 12  # blocks up to which cells have their numbers written in


def available() -> bool:
    """Whether the package that draws is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(facts: Facts, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    tall = 1.5 + 0.25 * len(facts.kinds)
    figure = Figure(figsize=(11.0, 1.6 + tall + 2.9), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(3, 2, height_ratios=(0.95, tall, 2.9))
    _size(facts, figure.add_subplot(grid[0, :]))
    _errors(facts, figure.add_subplot(grid[1, :]))
    left, right = figure.add_subplot(grid[2, 0]), figure.add_subplot(grid[2, 1])
    if facts.evaluation is not None:
        text = facts.evaluation["texts"][0]
        _positions(text, left)
        _distribution(text, facts.evaluation, right)
    else:
        _spans(facts, left)
        (_experts if facts.coverage else _activations)(facts, right)
    figure.suptitle(
        f"{facts.name}: {facts.bits:.2f} bits a weight", fontsize=13, color=TEXT, weight="bold"
    )
    with writing(path.parent):
        figure.savefig(path, dpi=DOTS, metadata={"Software": None})


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize=8.5, colors=TEXT)


def _size(facts: Facts, axes: Axes) -> None:
    _plain(axes, "Size")
    rows = [("after", facts.sizes, facts.bytes_after)]
    if facts.bytes_before:
        others = min(facts.sizes[OTHERS], facts.bytes_before)
        before = {CODES: facts.bytes_before - others, OTHERS: others}
        rows.append(("before", before, facts.bytes_before))
    most = max(total for _, _, total in rows)
    for row, (_, parts, total) in enumerate(rows):
        start = 0.0
        for name, held in parts.items():
            axes.barh(row, held, left=start, color=COLORS[name], height=0.62)
            start += held
        axes.text(total + most / 100, row, size(total), va="center", fontsize=9.5, color=TEXT)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_xlim(0, most * 1.12)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    named = [axes.barh(0, 0, color=COLORS[name]) for name, held in facts.sizes.items() if held]
    keys = [f"{name} {size(held)}" for name, held in facts.sizes.items() if held]
    axes.legend(
        named,
        keys,
        loc="lower right",
        bbox_to_anchor=(1, 0.98),
        ncols=4,
        fontsize=8.5,
        frameon=False,
    )


def _errors(facts: Facts, axes: Axes) -> None:
    of = "outputs" if facts.calibrated else "weights"
    _plain(axes, f"Error of {of}, by kind of layer and block")
    names = [kind.name for kind in facts.kinds]
    rows = [[facts.grid.get((name, block)) for block in facts.blocks] for name in names]
    values = [[float("nan") if v is None else 100 * v for v in row] for row in rows]
    most = 100 * max(facts.grid.values(), default=0.01)
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=most or 1, aspect="auto")
    axes.set_yticks(range(len(names)), names, family="monospace")
    step = max(1, -(-len(facts.blocks) // 40))
    axes.set_xticks(range(0, len(facts.blocks), step), [str(b) for b in facts.blocks[::step]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if len(facts.blocks) <= NUMBERED:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:
                    color = "white" if value > 0.6 * most else TEXT
                    axes.text(
                        x, y, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color
                    )
    bar = axes.figure.colorbar(image, ax=axes, pad=0.01, fraction=0.025)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8.5, colors=TEXT)
    bar.ax.yaxis.set_major_formatter("{x:.1f}%")


def _positions(text: dict[str, Any], axes: Axes) -> None:
    _plain(axes, "KL to the original, by tokens of context (95% interval)")
    places = text["positions"]
    x = [(place["first"] * place["last"]) ** 0.5 for place in places]
    means = [place["kl"]["mean"] for place in places]
    tail, middle = [p["kl_99"] for p in places], [p["kl_median"] for p in places]
    axes.plot(x, tail, "--", color=ORANGE)
    axes.plot(x, means, "o-", color=BLUE, markersize=3.5)
    axes.plot(x, middle, ":", color=MUTED)
    for name, values in (("99%", tail), ("mean", means), ("median", middle)):
        axes.annotate(name, (x[-1], values[-1]), (5, 0), textcoords="offset points", va="center",
                      fontsize=8.5, color=TEXT, annotation_clip=False)  # fmt: skip
    if all(place["kl"].get("low") is not None for place in places):
        low = [max(p["kl"]["low"], mean / 3) for p, mean in zip(places, means, strict=True)]
        axes.fill_between(x, low, [p["kl"]["high"] for p in places], color=BLUE, alpha=0.18, lw=0)
    if len(places) > 1:
        axes.set_xscale("log", base=2)
    if min(means) > 0:
        axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_ylabel("nats", fontsize=9, color=TEXT)
    axes.grid(axis="y", alpha=0.3)


def _distribution(text: dict[str, Any], evaluation: dict[str, Any], axes: Axes) -> None:
    mean = text["kl"]["mean"]
    _plain(axes, f"KL of single tokens: mean {mean:.4f}, same top token {text['same_top']:.1%}")
    counts, edges = text.get("kl_histogram"), evaluation.get("kl_edges")
    if counts and edges:
        filled = [place for place, count in enumerate(counts) if count]
        step = edges[1] / edges[0]
        lows = [edges[0] / step, *edges]
        shown = slice(filled[0], filled[-1] + 1)
        total = sum(counts)
        shares = [100 * count / total for count in counts][shown]
        widths = [low * (step - 1) for low in lows[shown]]
        axes.bar(lows[shown], shares, widths, align="edge", color=BLUE, alpha=0.65)
        axes.set_xscale("log")
        axes.set_ylim(0, 1.35 * max(shares))  # room for the names of the marks
        axes.yaxis.set_major_formatter("{x:.0f}%")
    for name, value in (("median", text["kl_median"]), ("mean", mean), ("99%", text["kl_99"])):
        if value <= 0:
            continue  # no place on a logarithmic axis
        axes.axvline(value, color=ORANGE, lw=1.2)
        axes.text(value, 1.0, f" {name}", transform=axes.get_xaxis_transform(), fontsize=8,
                  rotation=90, va="top", ha="right", color=ORANGE)  # fmt: skip
    axes.set_xlabel("nats", fontsize=9, color=TEXT)


def _spans(facts: Facts, axes: Axes) -> None:
    _plain(axes, "Layers by span (11 and less: an exact cast to FP8)")
    axes.bar(list(facts.spans), list(facts.spans.values()), color=BLUE)
    axes.set_xticks(range(12))
    axes.set_xlabel("span", fontsize=9, color=TEXT)


def _activations(facts: Facts, axes: Axes) -> None:
    known = [layer for layer in facts.layers if layer.activation_error is not None]
    if not known:
        _plain(axes, "Error of weights")
        axes.hist([100 * layer.weight_error for layer in facts.layers], bins=30, color=BLUE)
        axes.set_xlabel("%", fontsize=9, color=TEXT)
        return
    _plain(axes, "Error of outputs by FP4 weights and by FP8 activations, %")
    weights = [100 * layer.error for layer in known]
    lost = [100 * (layer.activation_error or 0) for layer in known]
    most = 1.05 * max(*weights, *lost)
    axes.plot([0, most], [0, most], color=GRAY, lw=1)
    axes.plot(weights, lost, "o", color=BLUE, markersize=3.5, alpha=0.6)
    axes.set_xlabel("FP4 weights", fontsize=9, color=TEXT)
    axes.set_ylabel("FP8 activations", fontsize=9, color=TEXT)


def _experts(facts: Facts, axes: Axes) -> None:
    _plain(axes, "Tokens of experts by block (box: the middle half)")
    blocks = list(facts.tokens)
    lows, quarters, middles, highs, mosts = zip(*map(spread, facts.tokens.values()), strict=True)
    axes.vlines(blocks, lows, mosts, color=GRAY, lw=1.5)
    axes.vlines(blocks, quarters, highs, color=BLUE, lw=max(2.0, min(14.0, 240 / len(blocks))))
    axes.plot(
        blocks, middles, "_", color="white", markersize=max(3.0, min(12.0, 200 / len(blocks)))
    )
    least, most = min(lows), max(mosts)
    axes.set_yscale("log" if least > 0 and most > 20 * least else "linear")
    axes.set_ylim(0 if axes.get_yscale() == "linear" else None)
    axes.set_xlabel("block", fontsize=9, color=TEXT)
    axes.set_xticks(blocks[:: max(1, -(-len(blocks) // 16))])
