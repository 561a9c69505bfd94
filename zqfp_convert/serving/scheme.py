"""What a checkpoint's descriptions say of its layers, by the names that vLLM asks with.

Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zqfp_convert.checkpoint import description, layout
from zqfp_convert.errors import CheckpointError, OptionError
from zqfp_convert.numerics.codebook import Codebook
from zqfp_convert.numerics.scales import Kind


@dataclass(frozen=True)
class Entry:
    """A quantized layer on disk.

    Attributes:
        name: on disk.
        rank: of its low-rank factors.
        bias_added: the checkpoint has a bias, the source has not; so vLLM's model has no place.
    """

    name: str
    rank: int
    bias_added: bool


@dataclass
class Scheme:
    """How a checkpoint is quantized, and which layers are.

    Attributes:
        kind: of its scales.
        group_size: None for groups of a whole row.
        books: its codebooks, one or two.
        factors: e4m3 or bf16, the format of its low-rank factors; None without any.
        input_offset: whether layers may have one.
        layers: the quantized ones by name, on disk and as vLLM's model calls them.
    """

    kind: Kind
    group_size: int | None
    books: tuple[Codebook, ...]
    factors: str | None
    input_offset: bool
    layers: dict[str, Entry] = field(default_factory=dict)

    def rename(self, mapped: Callable[[dict[str, Entry]], dict[str, Entry]]) -> None:
        """Know the layers by these names too."""
        self.layers |= mapped(self.layers)

    def sources(self, prefix: str, fused: Mapping[str, Sequence[str]]) -> list[Entry]:
        """The layers on disk that vLLM's linear of that name is made of; none if it is left alone.

        Args:
            prefix: the linear's name.
            fused: by the last part of a fused linear's name those of its parts.

        Raises:
            OptionError: some parts of a fused linear are quantized and others are not.
        """
        if prefix in self.layers:
            return [self.layers[prefix]]
        parent, dot, last = prefix.rpartition(".")
        names = [parent + dot + part for part in fused.get(last, ())]
        found = [name for name in names if name in self.layers]
        if found and len(found) < len(names):
            rest = sorted(set(names) - set(found))
            raise OptionError(
                prefix,
                f"{', '.join(found)} quantized and {', '.join(rest)} not",
                needed="all or none of them, since vLLM multiplies them as one matrix",
                do="Convert again with --ignore for all of them or for none.",
            )
        return [self.layers[name] for name in found]

    def group(self, columns: int) -> int:
        """Weights that share a scale in rows of `columns`."""
        return columns if self.group_size is None else min(self.group_size, columns)

    def groups(self, name: str, columns: int, part: int) -> int:
        """Scales of a row's part, where ranks share rows of `columns` in equal parts.

        Raises:
            OptionError: a group would be cut in two.
        """
        size = self.group(columns)
        whole = -(-columns // size)
        if part == columns:
            return whole
        if part % 2 or (whole > 1 and part % size):
            raise OptionError(
                name,
                f"{columns} input features in groups of {size}, of which each rank would have "
                f"{part}",
                needed="whole groups on each rank",
                do="Serve with fewer ranks (--tensor-parallel-size), or convert again with a "
                "--group-size that divides a rank's share.",
            )
        return max(1, part // size)


def read(folder: Path) -> Scheme:
    """The scheme of a checkpoint, from its `config.json` and its manifest.

    Raises:
        CheckpointError: they break a rule of the format.
    """
    quantization = description.read_config(folder)[layout.CONFIG_KEY]
    manifest = description.read_manifest(folder, quantization)
    lorc, size = quantization["lorc"], quantization["weights"]["group_size"]

    def entry(name: str, about: dict[str, Any]) -> Entry:
        added = manifest["changed"].get(name + layout.BIAS) == "bias_added"
        return Entry(name, about["rank"], added)

    return Scheme(
        quantization["weights"]["scales"],
        None if size == "row" else size,
        description.codebooks(quantization),
        None if lorc is None else lorc["factors"],
        "input_offset" in quantization["required_features"],
        {name: entry(name, about) for name, about in manifest["layers"].items()},
    )


def incomplete(layer: str, tensor: str, found: int, needed: int) -> CheckpointError:
    """The error for a layer that vLLM's model has not given all its tensors."""
    return CheckpointError(
        "missing-tensor",
        f"{layer}{tensor}",
        f"{found} tensors that vLLM's model has handed on",
        needed=f"{needed}, as the checkpoint has them",
        do="Serve with the weights in the folder (no --load-format dummy); if they are, vLLM's "
        "code for this model does not know these tensors, and another engine has to run it.",
    )
