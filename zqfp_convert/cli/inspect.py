"""`zqfp-convert inspect OUT/`."""

from __future__ import annotations

from dataclasses import asdict

from rich.markup import escape
from rich.table import Table

from zqfp_convert.cli import console

EXAMPLES = [
    ("zqfp-convert inspect OUT/", ""),
    ("zqfp-convert inspect OUT/ --json | jq .layers", "for programs"),
]


def command(
    checkpoint: console.Checkpoint,
    as_json: console.Json = False,
    log_file: console.LogFile = None,
    debug: console.Debug = False,
) -> None:
    """Show a checkpoint's layers: bits a weight, errors, spans."""
    with console.interface(debug, as_json=as_json, log_file=log_file) as ui:
        from zqfp_convert.checkpoint.coverage import coverage
        from zqfp_convert.checkpoint.reader import PackedCheckpoint
        from zqfp_convert.checkpoint.source import hub

        packed = PackedCheckpoint(hub.fetch(checkpoint))
        layers = {
            name: {**packed.manifest["layers"][name], "bits": packed.bits(name)}
            for name in packed.layers
        }
        if as_json:
            described = {"quantization_config": packed.quantization, "layers": layers}
            experts = coverage(packed.manifest["layers"])
            described["experts"] = {name: asdict(one) for name, one in experts.items()}
            ui.give({**described, "changed": packed.manifest["changed"]})
            return
        table = Table(box=None)
        table.add_column("layer", overflow="fold")
        for heading in ("N x K", "rank", "bits", "span", "raised", "weights", "outputs", "FP8"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, entry in layers.items():
            output = entry["output_error"]
            table.add_row(
                escape(name),
                "{} x {}".format(*entry["shape"]),
                str(entry["rank"]),
                f"{entry['bits']:.3f}",
                "-" if entry["span"] is None else str(entry["span"]),
                str(entry["raised_groups"]),
                f"{entry['weight_error']:.2%}",
                "-" if output is None else f"{output:.2%}",
                f"{entry['activation_error']:.2%}" if "activation_error" in entry else "-",
            )
        ui.print(table)
        covered = coverage(packed.manifest["layers"])
        if covered:
            ui.print(console.coverage_table(covered))
        weights = sum(n * k for n, k in (entry["shape"] for entry in layers.values()))
        bits = sum(e["bits"] * e["shape"][0] * e["shape"][1] for e in layers.values()) / weights
        described = packed.quantization
        producer, recipe = described["producer"], described["recipe"]
        ui.print(
            f"{len(layers)} layers, {weights:,} weights at {bits:.3f} bits; codes "
            f"{described['weights']['format']}, scales "
            f"{described['weights']['scales']}, groups of {described['weights']['group_size']}; "
            f"recipe {recipe.get('name', 'unnamed')}, made by {producer['name']} "
            f"{producer['version']}"
        )
        ui.print(
            f"left alone: {escape(console.kinds(described['ignore']))}; changed tensors: "
            f"{len(packed.manifest['changed'])}"
        )
