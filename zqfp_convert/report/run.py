"""Writes a checkpoint's report: the page and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zqfp_convert.checkpoint import layout
from zqfp_convert.checkpoint.output.disk import writing
from zqfp_convert.checkpoint.reader import PackedCheckpoint
from zqfp_convert.checkpoint.source import hub
from zqfp_convert.checkpoint.source.origin import origin
from zqfp_convert.errors import OptionError
from zqfp_convert.report import evaluated, picture
from zqfp_convert.report.advice import Finding, findings
from zqfp_convert.report.facts import Facts
from zqfp_convert.report.page import page as whole_page


@dataclass(frozen=True)
class Report:
    """What was written, and what it tells.

    Attributes:
        page: the file.
        picture: likewise; None without the package that draws it.
        evaluation: where figures of `evaluate` are kept now, if there are any.
        facts, findings: what they show.
    """

    page: Path
    picture: Path | None
    evaluation: Path | None
    facts: Facts
    findings: list[Finding]


def report(
    checkpoint: str | Path, *, evaluation: str | Path | None = None, to: str | Path | None = None
) -> Report:
    """Write `report.html`, and `report.png` where the package that draws is installed.

    Args:
        checkpoint: a packed checkpoint's folder, or a repository on the Hub.
        evaluation: what `evaluate --json` wrote of it; kept beside the files that are written, so
            that later reports find it. By default what an earlier report has kept, if any.
        to: an existing folder; by default the checkpoint's own, or this one for a repository.

    Raises:
        CheckpointError: the checkpoint breaks a rule of its format.
        OptionError: the evaluation is of another checkpoint or none, or `to` is no folder.
        OutputError: the folder cannot be written.
    """
    path = hub.fetch(checkpoint)
    own = Path(checkpoint).expanduser().is_dir()
    folder = Path(to).expanduser() if to is not None else path if own else Path()
    if not folder.is_dir():
        raise OptionError(
            str(folder), "no such folder", needed="a folder that exists", do="Make it, or give one."
        )
    packed = PackedCheckpoint(path)
    figures = evaluated.read(packed, Path(evaluation).expanduser() if evaluation else None)
    facts = Facts.of(packed, origin(path)["name"], figures)
    written = folder / layout.REPORT_PAGE
    with writing(folder):
        written.write_text(whole_page(facts), encoding="utf-8")
    drawn = folder / layout.REPORT_PICTURE if picture.available() else None
    if drawn is not None:
        picture.draw(facts, drawn)
    kept = None if figures is None else evaluated.keep(folder, figures)
    return Report(written, drawn, kept, facts, findings(facts))
