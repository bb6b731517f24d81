"""Conversations: scripted ones in this process, and one over a pseudo-terminal with a real process."""

import dataclasses
import io
import json
import os
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxft import cli
from jaxft.assets import ASSETS
from jaxft.checkpoint import hf
from jaxft.checkpoint.load import LoadedModel, load_model, random_model
from jaxft.cli.standard_input import prompt_lines, standard_input
from jaxft.data import load_tokenizer
from jaxft.errors import ConfigError, DataError, ModelError
from jaxft.generation.chat import HELP, Chat, check, converse
from jaxft.generation.settings import Sampling
from jaxft.generation.text import encode_prompt, generate_text

SMOKE = str(ASSETS / "smoke")
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The smoke model with drawn weights, which says letters only and never stops by itself."""
    folder = tmp_path_factory.mktemp("chat")
    drawn = random_model(SMOKE, seed=0, dtype="float32", param_dtype="float32")
    tokenizer = load_tokenizer(SMOKE)
    letters = [tokenizer.decode([i]).isalpha() for i in range(tokenizer.vocab_size)]
    table = drawn.module.embed_tokens.embedding
    # Tied: a token with a zero row has logit 0, and some letter is always above that.
    table.set_value(table.get_value() * np.array(letters)[:, None])
    hf.write_weights(drawn.module, str(folder))
    tokenizer.save(folder)
    hf.write_config(str(folder), drawn.hf_config, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def loaded(folder) -> LoadedModel:
    return load_model(str(folder))


@pytest.fixture
def chat(loaded) -> Chat:
    # The penalty makes it say something else than one letter over and over.
    sampling = Sampling(max_new_tokens=8, repetition_penalty=1000.0)
    return Chat(model=loaded.module, tokenizer=load_tokenizer(SMOKE), sampling=sampling)


def play(chat, *lines):
    """What is written when these lines are typed; an exception instead of a line is raised."""
    typed, written = iter(lines), []

    def read(prompt):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    converse(chat, read, written.append)
    assert written[0] == HELP
    return "".join(written[1:])


def answer_to(chat, messages):
    (answer,) = generate_text(chat.model, chat.tokenizer, [messages], chat.sampling)
    return answer.text


def test_each_answer_follows_from_the_whole_conversation(chat):
    chat.system = "Short."
    out = play(chat, "one", "  /two ")
    messages = [{"role": "system", "content": "Short."}]
    expected = ""
    for question in ("one", "/two"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer_to(chat, messages)})
        expected += f"{messages[-1]['content']}\n(cut off at --max_new_tokens=8)\n"
    assert len(messages[-1]["content"]) == 8
    assert chat.messages == messages
    # The second question went through the model alone, with what the template writes around it.
    before = encode_prompt(chat.tokenizer, messages[:2])
    assert chat.cache.computed <= len(encode_prompt(chat.tokenizer, messages[:-1])) - len(before) - 7
    assert out == expected + "\n"


def test_a_line_that_is_not_utf8_does_not_end_a_conversation(chat, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n/reset\n"), encoding="utf-8"))
    lines = list(standard_input("chat", "give lines"))
    out = play(chat, *lines)
    assert "bytes that are not UTF-8, from character 4 on" in out and "(new conversation)" in out
    assert chat.messages == []


def test_closed_standard_input_is_refused_and_a_prompt_that_is_not_utf8_is_named_by_its_line(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(ConfigError, match="it is closed: give --prompt=TEXT"):
        prompt_lines()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"one\n\n\xff\n"), encoding="utf-8"))
    with pytest.raises(DataError, match="line 3 of standard input has bytes that are not UTF-8"):
        prompt_lines()


def test_a_template_that_retells_what_was_said_gets_the_same_answers(chat):
    # As those of models that think: what led to an answer is told only until the next question.
    retelling = (
        "{% for m in messages %}{{ m.role }}{% if not loop.last and m.role == 'user' %}(earlier){% endif %}:"
        "{{ m.content }}\n{% endfor %}assistant:"
    )
    chat.tokenizer = load_tokenizer(SMOKE, chat_template=retelling)
    messages = []
    for question in ("one", "two", "three"):
        play(chat, question)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer_to(chat, messages)})
        assert chat.messages == messages
    assert chat.cache.computed < len(encode_prompt(chat.tokenizer, messages[:-1]))


def test_reset_forgets_turns_and_system_starts_anew(chat):
    chat.system = "Short."
    play(chat, "one", "/reset")
    assert chat.messages == [{"role": "system", "content": "Short."}]
    play(chat, "one", "/system Be long.  ")
    assert chat.messages == [{"role": "system", "content": "Be long."}]
    out = play(chat, "one", "/system")
    assert chat.messages == []
    assert out.endswith("(new conversation, without system message)\n\n")


def test_exit_leaves_and_nothing_is_sent_for_empty_lines_or_help(chat):
    assert play(chat, "", "   ", "/help", "/exit", "never read") == HELP
    assert chat.messages == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/rest", "'/rest' is not a command. Did you mean '/reset'?"),
        ("/etc/hosts is what?", "begin with a space"),
        ("/reset now", "/reset takes nothing after it"),
    ],
)
def test_a_mistyped_command_is_not_sent(chat, line, said):
    assert said in play(chat, line)
    assert chat.messages == []


def test_a_conversation_beyond_the_positions_is_refused_with_numbers(chat):
    said = len(encode_prompt(chat.tokenizer, [{"role": "user", "content": "one"}]))
    chat.sampling = Sampling(max_new_tokens=2049 - said)
    out = play(chat, "one")
    assert f"has {said} tokens and the answer may take {2049 - said}: 2049 together, and the model has 2048" in out
    assert "/reset" in out and chat.messages == []
    with pytest.raises(DataError, match="This message was not sent"):
        chat.ask("one", print)


def test_after_a_refusal_the_conversation_goes_on(chat):
    assert "not sent" in play(chat, "x" * 2048, "one")
    assert [m["content"] for m in chat.messages if m["role"] == "user"] == ["one"]


def test_ctrl_c_keeps_what_was_shown(chat):
    pieces = []

    def write(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    assert chat.ask("one", write) is None
    whole = answer_to(chat, [{"role": "user", "content": "one"}])
    assert chat.turns[1]["content"] == "".join(pieces) and whole.startswith("".join(pieces))
    assert pieces and len("".join(pieces)) < len(whole)


def test_ctrl_c_before_the_answer_takes_the_question_back(chat, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxft.generation.chat.generate_text", interrupted)
    assert play(chat, "one") == "\n(stopped)\n\n"
    assert chat.messages == []


def test_ctrl_c_at_the_prompt_goes_on(chat):
    assert play(chat, KeyboardInterrupt(), "/help") == "\n(Ctrl-D or /exit leaves)\n" + HELP + "\n"


def test_a_stop_text_ends_the_answer_without_a_note(chat):
    whole = answer_to(chat, [{"role": "user", "content": "one"}])
    chat.sampling = dataclasses.replace(chat.sampling, stop=(whole[3:5],))
    cut = whole[: whole.index(whole[3:5])]
    assert len(cut) == 3
    assert play(chat, "one") == cut + "\n\n"
    assert chat.turns[1]["content"] == cut


def test_a_template_without_system_messages_refuses_one(chat):
    chat.tokenizer = load_tokenizer(SMOKE, chat_template=NO_SYSTEM)
    with pytest.raises(DataError, match="no system"):
        check(chat.tokenizer, "Short.")
    check(chat.tokenizer)
    assert "no system" in play(chat, "/system Short.")
    assert chat.system is None


def test_a_model_without_chat_template_is_refused_before_weights_are_read(tmp_path, capsys):
    tokenizer = load_tokenizer(SMOKE)
    tokenizer.backend.chat_template = None
    tokenizer.save(tmp_path)
    with pytest.raises(ModelError, match="has no chat template"):
        check(load_tokenizer(tmp_path))
    assert cli.main(["chat", f"--model={tmp_path}"]) == 2
    assert "--chat_template=FILE" in capsys.readouterr().err


def test_settings_out_of_bounds_are_refused_at_once(capsys):
    assert cli.main(["chat", f"--model={SMOKE}", "--min_p=1.5"]) == 2
    assert "min_p=1.5 must be at least 0 and below 1" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="repetition_penalty"):
        Sampling(max_new_tokens=1, repetition_penalty=0.0)


def test_json_has_the_conversation_alone_on_standard_output(folder, capsys, monkeypatch):
    typed = iter(["one", "/exit"])
    monkeypatch.setattr("builtins.input", lambda *prompt: next(typed))
    assert cli.main(["chat", f"--model={folder}", "--max_new_tokens=4", "--system=Short.", "--json"]) == 0
    said = capsys.readouterr()
    messages = json.loads(said.out)["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]
    assert messages[-1]["content"] in said.err


def test_the_keys_of_a_terminal(folder):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "jaxft.cli", "chat", f"--model={folder}", "--max_new_tokens=1900"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"TERM": "dumb"}
    root = Path(__file__).parents[2]
    # Its own session with this terminal, so that keys become signals. Ctrl-C is heard even where a shell that put the
    # suite in the background has handed down that it be ignored.
    process = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, signal, sys, termios; os.setsid(); "
         "fcntl.ioctl(0, termios.TIOCSCTTY, 0); signal.signal(signal.SIGINT, signal.SIG_DFL); "
         "os.execv(sys.argv[1], sys.argv[1:])", *command],
        cwd=root, env=env, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    try:
        until(ours, "> ")
        os.write(ours, b"Hello there\n")
        until(ours, "Hello there\r\n")
        os.read(ours, 1)  # the first of the answer
        os.write(ours, b"\x03")
        assert "(stopped)" in until(ours, "> ")
        until(ours, "(Ctrl-D or /exit leaves)\r\n> ", press=b"\x03")
        os.write(ours, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def until(terminal: int, wanted: str, press: bytes = b"", seconds: int = 120) -> str:
    """What the terminal shows up to these characters; the keys are pressed again for each second of silence.

    input() shows its prompt a moment before a signal wakes it: a Ctrl-C in between waits for the next key.
    """
    shown, silences = "", 0
    os.write(terminal, press)
    while not shown.endswith(wanted):
        ready, _, _ = select.select([terminal], [], [], 1.0)
        if ready:
            shown += os.read(terminal, 1).decode(errors="replace")
            continue
        silences += 1
        assert silences < seconds, f"no {wanted!r} after {shown!r}"
        os.write(terminal, press)
    return shown
