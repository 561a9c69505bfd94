"""The report as one HTML page: nothing of it comes from elsewhere, nothing in it runs."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from zqfp_convert.report import svg
from zqfp_convert.report.advice import findings
from zqfp_convert.report.choices import choices, spelled_bits
from zqfp_convert.report.facts import CODES, FACTORS, OTHERS, SCALES, Facts, Kind, spread
from zqfp_convert.report.wording import interval, share, size

WORST = 10  # layers in the table of the least exact ones
STYLES = {CODES: "accent", SCALES: "light", FACTORS: "second", OTHERS: "rest"}
KEYS = {
    CODES: ("--accent", 1.0),
    SCALES: ("--accent", 0.5),
    FACTORS: ("--second", 1.0),
    OTHERS: ("--rest", 1.0),
}


def page(facts: Facts) -> str:
    """The whole page."""
    style = files("zqfp_convert.report").joinpath("page.css").read_text(encoding="utf-8")
    parts = [
        *_findings(facts),
        *_size(facts),
        *_quality(facts),
        *_errors(facts),
        *_spans(facts),
        *_experts(facts),
        *_made(facts),
    ]
    title = escape(facts.name)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}: a report of zqfp-convert</title>",
            f"<style>\n{style}</style></head>",
            "<body>",
            *_head(facts),
            "<main>",
            *parts,
            "</main>",
            "<footer>Written by zqfp-convert from what the checkpoint has on record.</footer>",
            "</body></html>\n",
        ]
    )


def _head(facts: Facts) -> Iterator[str]:
    source = facts.quantization["source"] or {}
    made_from = f" of <strong>{escape(str(source['name']))}</strong>" if source.get("name") else ""
    exact = facts.quantization["weights"]["scales"] != "free"
    multiplied = " that FP8 tensor cores multiply" if exact else ", with free scales"
    yield f"<header><h1>{escape(facts.name)}</h1>"
    yield (
        f'<p class="lead">A packed checkpoint{made_from} ({escape(facts.architecture)}): '
        f"{facts.weights:,} weights in {len(facts.layers):,} linear layers are 4-bit "
        f"floating-point numbers{multiplied}.</p>"
    )
    tiles = []
    if facts.bytes_before:
        times = facts.bytes_before / facts.bytes_after
        small = f"{size(facts.bytes_before)} before: {times:.2f} times smaller"
    else:
        small = "all tensors"
    tiles.append(("Size", size(facts.bytes_after), small))
    tiles.append(("Bits a weight", f"{facts.bits:.3f}", "scales and factors included"))
    if facts.evaluation is not None:
        text = facts.evaluation["texts"][0]
        added = 100 * (text["perplexity"] / text["original_perplexity"] - 1)
        tiles += [
            ("Mean KL", f"{text['kl']['mean']:.4f}", "to the original, nats a token"),
            (
                "Perplexity",
                f"{text['perplexity']:.2f}",
                f"{text['original_perplexity']:.2f} before: {added:+.1f}%",
            ),
            ("Same top token", f"{text['same_top']:.1%}", "as the original"),
        ]
    else:
        worst = max(facts.kinds, key=lambda kind: kind.middle(lambda layer: layer.error) or 0)
        error = worst.middle(lambda layer: layer.error) or 0
        of = "Error of outputs" if facts.calibrated else "Error of weights"
        middle = statistics.median(layer.error for layer in facts.layers)
        tiles.append((of, f"{middle:.1%}", "median of the layers"))
        tiles.append(("Least exact kind", f"{error:.1%}", worst.name))
    yield '<dl class="tiles">'
    for name, value, small in tiles:
        yield (
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(small)}</small></dd>"
            "</div>"
        )
    yield "</dl></header>"


def _findings(facts: Facts) -> Iterator[str]:
    yield "<section><h2>What limited it, and what to try</h2>"
    yield '<ol class="findings">'
    for found in findings(facts):
        attempt = f'<span class="try">Try: {escape(found.attempt)}</span>' if found.attempt else ""
        yield (f"<li><strong>{escape(found.title)}</strong>{escape(found.text)}{attempt}</li>")
    yield "</ol></section>"


def _size(facts: Facts) -> Iterator[str]:
    parts = [(name, float(held), STYLES[name]) for name, held in facts.sizes.items()]
    rows = [("after", parts, size(facts.bytes_after))]
    if facts.bytes_before:
        others = min(facts.sizes[OTHERS], facts.bytes_before)
        quantized = facts.bytes_before - others
        before = [("weights", float(quantized), "accent"), (OTHERS, float(others), "rest")]
        rows.insert(0, ("before", before, size(facts.bytes_before)))
    yield "<section><h2>Size</h2>"
    yield _figure(svg.bars(rows, "Bytes before and after, by what they are for"))
    yield '<ul class="keys">'
    for name, held in facts.sizes.items():
        if held:
            color, shade = KEYS[name]
            yield (
                f'<li style="--key: var({color}); --shade: {shade}">{escape(name)}: {size(held)}'
                f" ({held / facts.bytes_after:.1%})</li>"
            )
    yield "</ul>"
    yield f"<p>{escape(spelled_bits(facts))}</p></section>"


def _errors(facts: Facts) -> Iterator[str]:
    what = "outputs" if facts.calibrated else "weights"
    of_experts = " Cells of experts are the root of their mean square." if facts.coverage else ""
    measured = (
        "Relative error of each layer's outputs on the calibration text, by what became of its "
        "weights."
        if facts.calibrated
        else "Relative error of each layer's weights; without calibration that of their outputs is "
        "not known."
    )
    yield f"<section><h2>Errors by layer and kind</h2><p>{measured}</p>"
    names = [kind.name for kind in facts.kinds]
    chart = svg.cells(names, facts.blocks, facts.grid, f"Errors of {what} by kind and block")
    yield _figure(chart, f"The stronger the colour, the larger; the scale begins at 0.{of_experts}")
    yield _table(
        ("kind", "layers", "weights", "bits", "rank", "span", "error of weights", "of outputs",
         "of FP8 activations", "worst"),
        [_kind(kind) for kind in facts.kinds],
        f"Errors are medians over the layers of each kind; the worst is that of {what}.",
    )  # fmt: skip
    shown = facts.worst(WORST)
    yield f"<details><summary>The {len(shown)} least exact layers</summary>"
    yield _table(
        ("layer", "N x K", "error of weights", "of outputs", "of FP8 activations", "span"),
        [
            (
                layer.name,
                f"{layer.rows} x {layer.columns}",
                share(layer.weight_error),
                share(layer.output_error),
                share(layer.activation_error),
                "-" if layer.span is None else str(layer.span),
            )
            for layer in shown
        ],
    )
    yield "</details></section>"


def _kind(kind: Kind) -> tuple[str, ...]:
    ranks = sorted({layer.rank for layer in kind.layers})
    worst = kind.worst
    return (
        kind.name,
        f"{len(kind.layers):,}",
        f"{kind.weights:,}",
        f"{kind.bits:.3f}",
        str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "-" if kind.span is None else str(kind.span),
        share(kind.middle(lambda layer: layer.weight_error)),
        share(kind.middle(lambda layer: layer.output_error)),
        share(kind.middle(lambda layer: layer.activation_error)),
        f"{share(worst.error)} (block {worst.block})",
    )


def _spans(facts: Facts) -> Iterator[str]:
    if not facts.spans:
        return
    spans = range(12)
    raised = sum(layer.raised for layer in facts.layers)
    counts = [facts.spans.get(span, 0) for span in spans]
    told = f"{raised:,} groups were raised to keep it." if raised else "No group had to be raised."
    yield "<section><h2>Spans</h2>"
    yield (
        "<p>How far apart the scales of a row lie, in powers of two, in that row of each layer "
        f"where it is most. With up to 11 the cast to FP8 is exact. {told}</p>"
    )
    chart = svg.columns([str(s) for s in spans], counts, "Layers by span", "span", "layers")
    yield _figure(chart) + "</section>"


def _experts(facts: Facts) -> Iterator[str]:
    if not facts.coverage:
        return
    blocks, spreads = list(facts.tokens), [spread(each) for each in facts.tokens.values()]
    yield "<section><h2>Experts</h2>"
    yield (
        "<p>Tokens that each expert was calibrated on, as the router sent them: from the fewest to "
        "the most, the middle half as a box, the median as a line.</p>"
    )
    title = "Tokens that experts were calibrated on, by block"
    yield _figure(svg.ranges(blocks, spreads, title, "block", "tokens"))
    yield _table(
        ("experts", "how many", "fewest tokens", "median", "most", "pooled matrices"),
        [
            (
                name,
                str(one.experts),
                f"{one.fewest:,}",
                f"{middle:,.0f}",
                f"{one.most:,}",
                f"{one.pooled} of {one.matrices}",
            )
            for (name, one), (_, _, middle, _, _) in zip(
                facts.coverage.items(), spreads, strict=False
            )
        ],
        "Pooled matrices saw fewer tokens than they have columns, and were solved with the "
        "statistics of their block's experts together.",
        folded=len(facts.coverage) > 8,
    )
    yield "</section>"


def _quality(facts: Facts) -> Iterator[str]:
    found = facts.evaluation
    if found is None:
        return
    yield "<section><h2>How close it is</h2>"
    yield (
        f"<p>Compared with {escape(found['against'] or 'the original')} on text, in windows of "
        f"{found['window']:,} tokens ({escape(str(found['device']))}). KL is that of the "
        "original's distribution of the next token to this one's, in nats; 0 is the same model.</p>"
    )
    yield _table(
        ("text", "tokens", "perplexity", "original", "log-loss added", "mean KL", "median KL",
         "99% of KL", "99.9%", "same top"),
        [_text(text) for text in found["texts"]],
        "± is the 95% interval over windows.",
    )  # fmt: skip
    several = len(found["texts"]) > 1
    for text in found["texts"]:
        heading = f" on {text['text']}" if several else ""
        yield f"<h3>KL by position{escape(heading)}</h3>"
        yield _figure(
            _positions(text),
            "Over how many tokens of context came before. The band is the 95% interval of the "
            "mean.",
        )
        counts, edges = text.get("kl_histogram"), found.get("kl_edges")
        if counts and edges:
            yield f"<h3>Distribution of KL over tokens{escape(heading)}</h3>"
            marks = [
                ("median", text["kl_median"]),
                ("mean", text["kl"]["mean"]),
                ("99%", text["kl_99"]),
                ("99.9%", text["kl_999"]),
            ]
            named = [(f"{name} {value:.4f}", value) for name, value in marks]
            named.sort(key=lambda mark: mark[1])
            title = "Shares of tokens by their KL"
            yield _figure(svg.histogram(edges, counts, named, title, "KL, nats"))
    yield "</section>"


def _text(text: dict[str, Any]) -> tuple[str, ...]:
    return (
        text["text"],
        f"{text['tokens']:,}",
        f"{text['perplexity']:.3f}",
        f"{text['original_perplexity']:.3f}",
        interval(text["loss_difference"]),
        interval(text["kl"]),
        f"{text['kl_median']:.4f}",
        f"{text['kl_99']:.3f}",
        f"{text['kl_999']:.3f}",
        f"{text['same_top']:.2%}",
    )


def _positions(text: dict[str, Any]) -> str:
    places = text["positions"]
    x = [(place["first"] * place["last"]) ** 0.5 for place in places]
    labels = [
        f"{p['first']:,}" if p["first"] == p["last"] else f"{p['first']:,}-{p['last']:,}"
        for p in places
    ]
    least = min(place["kl"]["mean"] for place in places) / 3  # an interval may reach below 0
    mean = svg.Line(
        "mean",
        [place["kl"]["mean"] for place in places],
        "accent",
        [_floor(place["kl"].get("low"), least) for place in places],
        [place["kl"].get("high") for place in places],
    )
    middle = svg.Line("median", [place["kl_median"] for place in places], "rest")
    tail = svg.Line("99%", [place["kl_99"] for place in places], "second")
    title = "KL by the number of tokens before"
    return svg.lines(x, labels, [tail, mean, middle], title, "tokens before the predicted one")


def _floor(value: float | None, least: float) -> float | None:
    return None if value is None else max(value, least)


def _made(facts: Facts) -> Iterator[str]:
    yield "<section><h2>How it was made</h2>"
    yield '<div class="scroll" tabindex="0"><table class="words"><tbody>'
    for name, value in choices(facts.quantization).items():
        yield f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
    yield "</tbody></table></div></section>"


def _figure(drawing: str, caption: str = "") -> str:
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure tabindex="0">{drawing}{told}</figure>'


def _table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    caption: str = "",
    *,
    folded: bool = False,
) -> str:
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row"><code>{escape(row[0])}</code></th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    table = (
        f'<div class="scroll" tabindex="0"><table>{told}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    return f"<details><summary>As a table</summary>{table}</details>" if folded else table
