"""The errors a user can meet. Each says where, what was found, what is needed and what to do.

Faults of the program itself are assertions, not these.
"""

from __future__ import annotations


class ZqfpError(Exception):
    """A user's error: ends a command with exit code 2 and without a traceback.

    Args:
        where: the file, layer or option at fault.
        found: what was found there.
        needed: what is needed instead.
        do: what the user can do about it.
    """

    def __init__(self, where: str, found: str, *, needed: str, do: str) -> None:
        self.where, self.found, self.needed, self.do = where, found, needed, do
        super().__init__(f"{where}: {found}; needed: {needed}. {do}")

    def advise(self, more: str) -> None:
        """Say one thing more that the user can do, a whole sentence."""
        self.do = f"{self.do} {more}"
        self.args = (f"{self.args[0]} {more}",)


class OptionError(ZqfpError):
    """An option or argument that cannot be used as given."""


class SourceError(ZqfpError):
    """The model to convert is missing, damaged, or of a kind that cannot be converted."""


class OutputError(ZqfpError):
    """The output folder cannot be written: it exists, or there is too little room."""


class ProcessError(ZqfpError):
    """Another process of the same work has failed, or is gone."""


class Stopped(KeyboardInterrupt):
    """Ctrl-C during work that can be gone on with; its text says how."""


class CheckpointError(ZqfpError):
    """A zqfp checkpoint breaks a rule of its format.

    `rule` is the identifier that `formats/zqfp-1.md` gives the broken rule.
    """

    def __init__(self, rule: str, where: str, found: str, *, needed: str, do: str) -> None:
        self.rule = rule
        super().__init__(where, f"{found} [{rule}]", needed=needed, do=do)
