"""`--log-file`: what a command has shown, with times, as plain lines at the end of a file."""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from zqfp_convert import __version__
from zqfp_convert.errors import OptionError

WIDTH = 160
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
_HIDDEN = "hf_***"
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN")


class Log:
    """Lines that are appended to a file, each with the time. Tokens are made unreadable.

    Raises:
        OptionError: nothing can be written to the file.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise OptionError(
                f"--log-file {path}",
                f"cannot be written ({error.strerror})",
                needed="the name of a file in a folder that is there",
                do="Give another one.",
            ) from error
        self._begun = False

    def write(self, text: str) -> None:
        """Append lines."""
        if not self._begun:
            self._begun = True
            self.write(f"zqfp-convert {__version__}: {shlex.join(sys.argv[1:])}")
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        for line in redacted(text).splitlines():
            if line.strip():
                self._file.write(f"{now}  {line.rstrip()}\n")
        self._file.flush()

    def print(self, *things: Any, markup: bool = True) -> None:
        """Append what a console would show, without colours."""
        plain = io.StringIO()
        console = Console(file=plain, width=WIDTH, no_color=True, highlight=False)
        console.print(*things, soft_wrap=all(isinstance(t, str) for t in things), markup=markup)
        self.write(plain.getvalue())

    def warn(self, message: Warning | str, category: type[Warning], *rest: Any) -> None:
        """Append a warning, and show it as always; for `warnings.showwarning`."""
        self.write(f"{category.__name__}: {message}")
        self._shows(message, category, *rest)

    def __enter__(self) -> Log:
        self._shows: Any = warnings.showwarning
        stand_in: Any = self.warn
        warnings.showwarning = stand_in
        return self

    def __exit__(self, *error: object) -> None:
        warnings.showwarning = self._shows
        self._file.close()


def redacted(text: str) -> str:
    """A text in which tokens of the Hub are unreadable."""
    for name in _VARIABLES:
        if secret := os.environ.get(name):
            text = text.replace(secret, _HIDDEN)
    return _TOKEN.sub(_HIDDEN, text)
