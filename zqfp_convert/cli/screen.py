"""Help that fits a screen: common options first, rare ones on a page of their own, examples last.

The pages are laid out here because boxes and columns of types leave the words half the width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

RARE = "Rare options"  # a panel's name that starts so is on the page of --help-all alone
ALL, JSON = "--help-all", "--json"
WIDEST = 100  # columns; longer lines are hard to read

Examples = Sequence[tuple[str, str]]
"""Commands as they are typed, each with what it does, or nothing where it says so itself."""


class Command(TyperCommand):
    """A command whose `--help` leaves out the panels of rare options; `--help-all` has them."""

    every = False
    examples: Examples = ()

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What stands behind the command's name where it is used wrongly."""
        words = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return [str(p.metavar) for p in words] + ["[options]"]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        page = Page()
        params: list[Any] = self.get_params(ctx)
        words = [p for p in params if p.param_type_name == "argument"]
        page.text(f"Usage: {ctx.command_path} {escape(' '.join(self.collect_usage_pieces(ctx)))}")
        page.text(self.help or "")
        page.rows("", [(str(p.metavar), p.help or "") for p in words])
        panels: dict[str, list[Any]] = {"Options": []}
        split = any(ALL in p.opts for p in params)
        for one in params:
            if one not in words and not one.hidden:
                panel = (getattr(one, "rich_help_panel", None) if split else None) or "Options"
                panels.setdefault(panel, []).append(one)
        for name, options in panels.items():
            if self.every or not name.startswith(RARE):
                page.rows(name, [_row(p) for p in options])
        page.rows("Examples", [(command, what) for command, what in self.examples], 0)
        formatter.write(page.end())


class Commands(TyperGroup):
    """The program, whose help page has the first line of each command's."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take what was typed, and remember whether it asks for JSON."""
        ctx.meta[JSON] = JSON in args
        found: list[str] = super().parse_args(ctx, args)
        return found

    def invoke(self, ctx: Any) -> Any:
        """Run a command; where it is used wrongly with --json, the error is such an object too."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            told = getattr(error, "format_message", None)  # of errors of use alone
            if told is not None and ctx.meta[JSON]:
                typer.echo(json.dumps({"error": told()}, ensure_ascii=False))
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help page."""
        page = Page()
        page.text(f"Usage: {ctx.command_path} COMMAND … \\[options]")
        page.text(self.help or "")
        panels: dict[str, list[Any]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            panels.setdefault(command.rich_help_panel, []).append(command)
        for panel, commands in panels.items():
            page.rows(panel, [(c.name, c.short_help or c.help or "") for c in commands], 10)
        params: list[Any] = self.get_params(ctx)
        page.rows("Options", [_row(p) for p in params if not p.hidden])
        page.text(self.epilog or "")
        formatter.write(page.end())


class Page:
    """A help page as it grows, for the terminal that it is written to."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._console.width = min(self._console.width, WIDEST)
        self._captured = self._console.capture()
        self._captured.__enter__()

    def text(self, text: str) -> None:
        """Paragraphs, in rich's markup, each with an empty line behind it."""
        for paragraph in text.strip().split("\n\n") if text else ():
            table = paragraph.startswith("[bold]")  # of which each line stays
            self._console.print(paragraph if table else " ".join(paragraph.split()))
            self._console.print()

    def rows(self, heading: str, rows: Iterable[tuple[str, str]], names: int = 24) -> None:
        """Names and what they mean; the column of names has `names` characters at least."""
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(no_wrap=True, min_width=names)
        grid.add_column()
        for name, words in rows:
            grid.add_row(f"  [bold]{escape(name)}[/]", words)
        if not grid.row_count:
            return
        if heading:
            self._console.print(f"[bold]{heading}[/]")
        self._console.print(grid)
        self._console.print()

    def end(self) -> str:
        """All of it."""
        self._captured.__exit__(None, None, None)
        return "\n".join(line.rstrip() for line in self._captured.get().splitlines()) + "\n"


def _row(option: Any) -> tuple[str, str]:
    names = sorted([*option.opts, *option.secondary_opts], key=lambda name: name.startswith("--"))
    told = "/".join(names) if option.secondary_opts else ", ".join(names)
    if not option.is_flag:
        told += f" {option.metavar}"
    words = option.help or ""
    if isinstance(option.default, (int, float, str)) and not option.is_flag:
        words += f" \\[default: {option.default}]"
    return told, words


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        command: Any = ctx.command
        command.every = True
        try:
            typer.echo(ctx.get_help())
        finally:
            command.every = False
        raise typer.Exit


HelpAll = Annotated[
    bool,
    typer.Option(ALL, callback=_show_all, is_eager=True, help="Show the rare options too."),
]


def with_examples(lines: Examples) -> type[Command]:
    """The kind of a command whose help page ends with these examples."""
    return type("Command", (Command,), {"examples": lines})


def choices(*values: str) -> Callable[[str], list[str]]:
    """Completes an option that has these values."""
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]
