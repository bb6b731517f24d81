"""The console: text of others is neither markup nor a command to the terminal, wherever rich shows it."""

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from jaxft.conversion.progress import progress
from jaxft.terminal.console import SafeConsole, cell, say

PACKAGE = Path(__file__).parent.parent.parent / "jaxft"
HOSTILE = "x[/b]y[bold] :smile: \x1b]0;owned\x07 \u202e{task.total}"


def printed(use, **settings):
    out = io.StringIO()
    use(SafeConsole(file=out, width=200, **settings))
    return out.getvalue()


def with_table(console):
    table = Table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)


@pytest.mark.parametrize("settings", [{}, {"force_terminal": True, "color_system": "truecolor", "_environ": {}}])
@pytest.mark.parametrize(
    "use",
    [
        lambda console: console.print(HOSTILE),
        lambda console: console.print(Text(HOSTILE.replace("\x07", "")), soft_wrap=True),
        lambda console: say(console, HOSTILE, style="yellow"),
        with_table,
    ],
)
def test_what_others_wrote_is_shown_and_not_obeyed(use, settings):
    text = printed(use, **settings)
    assert "x[/b]y[bold] :smile:" in text and r"\x1b]0;owned" in text
    assert "\x1b]" not in text and "\u202e" not in text and "\x07" not in text


def test_a_console_of_the_caller_reads_no_markup_either():
    out = io.StringIO()
    say(Console(file=out, width=40), HOSTILE * 3)
    table = Table("name")
    table.add_row(cell(HOSTILE))
    Console(file=out, width=200).print(table)
    assert out.getvalue().count("x[/b]y[bold] :smile:") == 4 and "\x1b" not in out.getvalue()


def test_labels_of_progress_are_no_format_strings():
    text = printed(lambda console: use_progress(console), force_terminal=True, _environ={})
    assert "{task.total}" in text and "\x1b]" not in text


def use_progress(console):
    with progress(console, HOSTILE, 10) as advance:
        advance(10)


def test_a_live_line_keeps_rich_its_own_commands():
    out = io.StringIO()
    with Progress(
        TextColumn("{task.description}", markup=False), console=SafeConsole(file=out, force_terminal=True)
    ) as bar:
        bar.add_task(HOSTILE)
    assert "\x1b[" in out.getvalue() and "\x1b]" not in out.getvalue()


def test_no_module_prints_a_string_or_makes_a_console_itself():
    modules = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "terminal"]
    nodes = [(path, node) for path in modules for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    for path, node in nodes:
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        assert text != "Console", f"{path}:{node.lineno}: use jaxft.terminal.console.SafeConsole"
        if text.endswith("console.print") and node.args:
            assert isinstance(node.args[0], ast.Name), f"{path}:{node.lineno}: use jaxft.terminal.console.say"
