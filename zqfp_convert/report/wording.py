"""Numbers and names in words, alike on a terminal, the page, the picture and the model card.

Light: it imports nothing of the package, and so does not slow the command line down.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

NUMBER = re.compile(r"\.\d+(?=\.|$)")  # in a name


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def share(value: float | None) -> str:
    """A relative error, or a dash."""
    return "-" if value is None else f"{value:.2%}"


def interval(found: dict[str, Any]) -> str:
    """A mean with half the width of its interval, of `evaluate`'s JSON."""
    high = found.get("high")
    return f"{found['mean']:.4f}" + (f" ± {high - found['mean']:.4f}" if high is not None else "")


def starred(name: str) -> str:
    """A name with stars for the numbers that count blocks and experts."""
    return NUMBER.sub(".*", name)


def kinds(names: Iterable[str], most: int | None = None) -> str:
    """Names in a row, those that differ by their numbers alone together; `most` of these."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(starred(name), []).append(name)
    shown = [f"{kind} ({len(each)})" if len(each) > 1 else each[0] for kind, each in alike.items()]
    if most is not None and len(shown) > most:
        shown[most:] = [f"{len(shown) - most} more kinds"]
    return ", ".join(shown) or "nothing"
