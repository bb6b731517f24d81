"""A conversation on the terminal: every answer depends on all earlier messages."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from jaxft.data.chat.reasoning import field_of
from jaxft.data.tokenizers.templates import fitting
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError, ModelError, did_you_mean
from jaxft.generation.conversation_cache import ConversationCache
from jaxft.generation.settings import Generated, Sampling
from jaxft.generation.text import encode_prompt, generate_text
from jaxft.nn.decoder import Decoder
from jaxft.system import undecoded
from jaxft.terminal.text import safe_text

PROMPT = "> "
THOUGHTS, ANSWER = "(thoughts)", "(answer)"  # what is written above each, if a model thinks
COMMANDS = {
    "/reset": "forget the conversation; the system message stays",
    "/system": "start a new conversation with the text after it as system message, or with none",
    "/help": "show this",
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops an answer",
}
HELP = "".join(f"{name:<8} {about}\n" for name, about in COMMANDS.items())

Read = Callable[[str], str]  # shows a prompt and returns a line; EOFError at the end
Write = Callable[[str], None]


@dataclass(kw_only=True)
class Chat:
    """A model, the settings of its answers, and the conversation so far.

    turns: messages of user and assistant in turn. The same question after the same turns gets the same answer:
    random draws depend on the seed and the position of a token. cache: the KV cache of the conversation; only the new
    message is computed as long as the template renders the earlier ones as before.
    """

    model: Decoder
    tokenizer: Tokenizer
    sampling: Sampling
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    cache: ConversationCache = field(default_factory=ConversationCache)

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages for the chat template, the system message included."""
        return [*_system(self.system), *self.turns]

    def ask(self, text: str, write: Write) -> Generated | None:
        """Writes the answer while it is generated, and adds question and answer to the conversation.

        Thoughts before it are shown apart, and are no part of what is remembered as the answer. None if Ctrl-C stopped
        it: the text shown so far is then the answer. If there is nothing but thoughts, the question is forgotten too.
        Raises DataError, and leaves the conversation as it was, for messages that the template refuses
        or that exceed the model's positions.
        """
        question = {"role": "user", "content": text}
        conversation = [*self.messages, question]
        self._check_room(conversation)
        shown: list[str] = []
        thoughts: list[str] = []

        def show(row: int, piece: str) -> None:
            if thoughts and not shown:
                write(f"\n{ANSWER}\n")
            shown.append(piece)
            write(piece)

        def show_thoughts(row: int, piece: str) -> None:
            if not thoughts:
                write(f"{THOUGHTS}\n")
            thoughts.append(piece)
            write(piece)

        try:
            (answer,) = generate_text(
                self.model,
                self.tokenizer,
                [conversation],
                self.sampling,
                on_text=show,
                on_thoughts=show_thoughts,
                cache=self.cache,
            )
        except KeyboardInterrupt:
            answer = None
        if shown or (answer is not None and not thoughts):
            self.turns += [question, self._message("".join(shown), "".join(thoughts).strip())]
        return answer

    def _message(self, answer: str, thoughts: str) -> dict[str, str]:
        """An answer as a message. The template decides what becomes of thoughts, if it reads them from a field."""
        field = field_of(self.tokenizer.chat_template)
        return {"role": "assistant", "content": answer} | ({field: thoughts} if field and thoughts else {})

    def _check_room(self, conversation: list[dict[str, str]]) -> None:
        tokens, most = len(encode_prompt(self.tokenizer, conversation)), self.sampling.max_new_tokens
        limit = self.model.config.max_position_embeddings
        if tokens + most > limit:
            raise DataError(
                f"the conversation has {tokens} tokens and the answer may take {most}: {tokens + most} together, and "
                f"the model has {limit} positions. This message was not sent: shorten it, /reset to start anew, or "
                "come back with a lower --max_new_tokens."
            )


def check(tokenizer: Tokenizer, system: str | None = None) -> None:
    """Checks, before any weight is read, that conversations can be rendered.

    Raises ModelError if there is no chat template, DataError if it takes no system message.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name!r} has no chat template, so how the model expects a conversation is "
            "not known. Pass the template that it was trained with as --chat_template=FILE, or a built-in one that "
            f"fits its tokenizer ({', '.join(fitting(tokenizer.backend)) or 'none'}), or let it continue plain text: "
            "jaxft generate --prompt=TEXT"
        )
    tokenizer.render([*_system(system), {"role": "user", "content": "?"}], add_generation_prompt=True)


def converse(chat: Chat, read: Read, write: Write) -> None:
    """Reads messages and commands and answers them until /exit or the end of the input."""
    write(HELP)
    while True:
        try:
            line = read(PROMPT)
        except KeyboardInterrupt:
            write("\n(Ctrl-D or /exit leaves)\n")
            continue
        except EOFError:
            write("\n")
            return
        if (problem := undecoded(line)) is not None:
            write(f"(this line {problem}, and was not sent)\n")
            continue
        if line.rstrip() == "/exit":
            return
        if line.startswith("/"):
            _command(chat, line, write)
        elif line.strip():
            _answer(chat, line.strip(), write)


def _answer(chat: Chat, text: str, write: Write) -> None:
    try:
        answer = chat.ask(text, write)
    except DataError as error:
        write(f"{error}\n")
        return
    if answer is None:
        write("\n(stopped)")
    elif answer.thoughts and not answer.text:
        write(
            f"\n(it ended in its thoughts: there is no answer, and your message is forgotten. Give more room by "
            f"--max_new_tokens, now {chat.sampling.max_new_tokens})"
        )
    elif answer.finish_reason == "length":
        write(f"\n(cut off at --max_new_tokens={chat.sampling.max_new_tokens})")
    write("\n")


def _command(chat: Chat, line: str, write: Write) -> None:
    name, _, text = line.strip().partition(" ")
    text = text.strip()
    if name not in COMMANDS or (text and name != "/system"):
        hint = did_you_mean(name, COMMANDS) if name not in COMMANDS else f" {name} takes nothing after it."
        write(f"{line.strip()!r} is not a command.{hint} To send it as a message, begin with a space.\n")
    elif name == "/help":
        write(HELP)
    elif name == "/reset":
        chat.turns.clear()
        write("(new conversation)\n")
    else:
        try:
            check(chat.tokenizer, text or None)
        except DataError as error:
            write(f"{error}\n")
            return
        chat.system = text or None
        # Answers given under another system message would contradict this one.
        chat.turns.clear()
        write(f"(new conversation, {'with this' if text else 'without'} system message)\n")


def terminal(out: TextIO, *, raw: bool = False) -> tuple[Read, Write]:
    """read and write for a conversation on standard input and `out`, with line editing if readline is installed.

    raw: characters that a terminal obeys are written as they are, not as escapes.
    """
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # noqa: F401  importing it gives input() its keys

    def write(text: str) -> None:
        out.write(text if raw else safe_text(text))
        out.flush()

    def read(prompt: str) -> str:
        if out is sys.stdout:
            return input(prompt)  # readline must know the prompt to redraw the line
        write(prompt)
        return input()

    return read, write


def _system(text: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": text}] if text else []
