"""Text of others: no character that a terminal obeys or hides reaches it, and none of it is endless."""

import io
import json
import logging
import sys
import unicodedata
import warnings
from argparse import Namespace

import pytest

from jaxft.cli import answers
from jaxft.cli.parser import make_parser
from jaxft.generation import chat
from jaxft.terminal.text import protect_logs, safe_json, safe_line, safe_message, safe_text

EVERYTHING = "".join(map(chr, range(sys.maxunicode + 1)))
# Visible signs of Arabic and other scripts, which Unicode counts as format characters, and the joiners of emoji.
VISIBLE_FORMAT = {0x600, 0x601, 0x602, 0x603, 0x604, 0x605, 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0x110BD, 0x110CD}


def dangerous(text):
    """The characters of a text that a terminal obeys or hides, by their categories in Unicode's own table."""
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    shorthand = range(0x13430, 0x1D17B)  # hieroglyphs, shorthand and music, whose fonts need their format characters
    return {
        character
        for character in text
        if unicodedata.category(character) in kinds
        and ord(character) not in VISIBLE_FORMAT
        and ord(character) not in shorthand
    }


def test_no_character_of_unicode_that_a_terminal_obeys_is_left():
    assert dangerous(EVERYTHING) > {"\x1b", "\x9b", "\r", "\u202e", "\ud800", "\u200b"}
    assert dangerous(safe_text(EVERYTHING)) == {"\t", "\n", "\u200c", "\u200d"}
    assert dangerous(safe_line(EVERYTHING, most=len(EVERYTHING))) == set()


def test_ordinary_text_stays_as_it_is():
    text = "Straße, \u4e2d\u6587, \u05e9\u05dc\u05d5\u05dd, 'x' \\n [bold]\n\tfamily: \U0001f468\u200d\U0001f469"
    assert safe_text(text) == text and safe_message("one\n  two") == "one\n  two"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("\x1b]0;x\x07", r"\x1b]0;x\x07"), ("a\u202eb", r"a\u202eb"), ("\ud800", r"\ud800"), ("a\rb\n", "a\\rb\\n")],
)
def test_escapes_name_the_character(text, shown):
    assert safe_line(text) == shown


def test_a_newline_in_a_name_forges_no_line():
    lines = safe_message("no tensor named 'x\nstep 7/10  loss 0.1\nerror: none'").splitlines()
    assert [line.startswith("  ") for line in lines] == [False, True, True]


def test_long_names_lose_their_middle_and_say_how_much():
    assert safe_line("a" * 5_000_000 + "z", most=100).endswith("z") and len(safe_line("a" * 5_000_000)) < 350
    message = safe_message("tensor " + "a" * 5_000_000 + " is not there.\n" + "x\n" * 10**6 + "Remove it.")
    assert len(message) < 30_000 and message.endswith("Remove it.") and "characters left out" in message


def test_json_holds_the_same_values_and_nothing_that_a_terminal_obeys():
    apart = [character for character in EVERYTHING if unicodedata.category(character) == "Cs"]
    value = {"answers": [EVERYTHING[:0xD800] + EVERYTHING[0xE000:], *apart]}
    text = safe_json(value)
    assert json.loads(text) == value and not dangerous(text) - {"\n", "\u200c", "\u200d"}


def test_logs_and_warnings_of_libraries_are_escaped(caplog, monkeypatch):
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    try:
        protect_logs()
        logging.getLogger("absl").warning("folder %s", "a\x1b[2J\nINFO: saved")
        assert caplog.messages == [r"folder a\x1b[2J" + "\n  INFO: saved"]
        assert "\x1b" not in warnings.formatwarning(UserWarning("\x1b[2J"), UserWarning, "file.py", 1)
    finally:
        logging.setLogRecordFactory(factory)


@pytest.mark.parametrize(("terminal", "raw"), [(True, False), (True, True), (False, False)])
def test_answers_are_escaped_on_a_terminal_alone(terminal, raw, monkeypatch, capsys):
    piece = "tab\t\n\x1b[2J\u202e"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show, show_thoughts = answers._writers(answers._shown(Namespace(raw=raw)))
    show_thoughts(0, piece)
    show(0, piece)
    out, err = capsys.readouterr()
    expected = "tab\t\n" + r"\x1b[2J\u202e" if terminal and not raw else piece
    assert out == expected and err.startswith(expected)


@pytest.mark.parametrize("raw", [True, False])
def test_a_conversation_is_escaped_unless_raw(raw):
    out = io.StringIO()
    _, write = chat.terminal(out, raw=raw)
    write("\x1b]0;owned\x07\n")
    assert ("\x1b" in out.getvalue()) is raw and out.getvalue().endswith("\n")


def test_the_options_of_answers_have_raw():
    for verb in ("generate", "chat"):
        assert "--raw" in make_parser()._subparsers._group_actions[0].choices[verb].format_help()
