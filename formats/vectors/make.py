"""Make the test vectors of zqfp-1: `python formats/vectors/make.py [FOLDER]`.

Tiny checkpoints, whole and broken, with what a reader must decode or answer, and activations with
their bytes. The same files each time, from the standard library alone; shares no code with the
reader, so that each checks the other.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from activation_rows import activation_rows
from invalid_cases import INVALID
from tiny_checkpoint import Files, count_bytes, render, to_json
from valid_cases import VALID


def make() -> Files:
    """All files, by their path below the folder of the vectors."""
    made = {"activations.json": to_json({"rows": activation_rows()})}
    for case, build in VALID.items():
        checkpoint = build()
        answers = {
            name: {"bytes": count_bytes(checkpoint, name)} | answer
            for name, answer in checkpoint.expected.items()
        }
        files = render(checkpoint) | {"expected.json": to_json({"layers": answers})}
        made |= {f"valid/{case}/{name}": data for name, data in files.items()}
    for case, broken in INVALID.items():
        files = broken.files() | {"error.json": to_json({"rule": broken.rule})}
        made |= {f"invalid/{case}/{name}": data for name, data in files.items()}
    return made


def main(folder: Path) -> None:
    """Replace the vectors in `folder`."""
    for part in ("valid", "invalid"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for name, data in make().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
