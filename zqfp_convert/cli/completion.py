"""Completion by a shell, also where the word `convert` is left out."""

from __future__ import annotations

import os
from collections.abc import Callable

VARIABLE = "_ZQFP_CONVERT_COMPLETE"
_WORDS, _CURRENT = "COMP_WORDS", "COMP_CWORD"  # of bash: all words, and which one is typed
_LINE = "_TYPER_COMPLETE_ARGS"  # of the other shells: the line up to the cursor


def prepare(arguments: Callable[[list[str]], list[str]]) -> None:
    """Where a shell asks for completion, put in what the words it names leave out.

    Args:
        arguments: gives the words behind the program's name with what may be left out.
    """
    if VARIABLE not in os.environ:
        return
    if _WORDS in os.environ:
        line = os.environ[_WORDS]
        words = line.split("\n") if "\n" in line else line.split()
        begun = int(os.environ.get(_CURRENT, "0"))
        if begun > 1 and _left_out(words[1:begun], arguments):
            os.environ[_WORDS] = "\n".join([words[0], "convert", *words[1:]])
            os.environ[_CURRENT] = str(begun + 1)
    if _LINE in os.environ:
        line = os.environ[_LINE]
        words = line.split()
        begun = len(words) - (0 if line.endswith(" ") else 1)  # words that are whole
        if begun > 1 and _left_out(words[1:begun], arguments):
            os.environ[_LINE] = line.replace(words[0], f"{words[0]} convert", 1)


def _left_out(words: list[str], arguments: Callable[[list[str]], list[str]]) -> bool:
    return words[0] != "convert" and arguments(words)[0] == "convert"
