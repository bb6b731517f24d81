"""One tokenizer for text and chat: encoding, decoding, rendering by the chat template, saving."""

import copy
import functools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxft.data.chat import template_probes, template_text
from jaxft.data.chat.tool_calls import with_json_values, with_short_ids
from jaxft.data.rows.values import HALF
from jaxft.data.tokenizers.end_tokens import end_tokens, eos_field
from jaxft.data.tokenizers.table import AddedRows, added_rows
from jaxft.data.tokenizers.templates import fitting
from jaxft.errors import ConfigError, DataError, ModelError, listed
from jaxft.terminal.text import safe_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHOWN = 5  # tokens that an error suggests to add
# The index of a token -> the start and the end of its text, in characters.
Spans = Callable[[int], tuple[int, int]]


class TemplateRefusal(DataError):
    """A chat template that raises an error for messages."""


class TemplateLimit(ModelError):
    """A chat template that was stopped because it does more than rendering messages can need."""


class Tokenizer:
    """Text to token ids and back, and chats to text; a thin wrapper of a fast transformers tokenizer.

    Attributes: vocab_size (highest id + 1), bos_id, eos_id (None if there is none), pad_id
    (falls back to eos_id, then 0), stop_ids (ids that end an answer), chat_template (Jinja text or
    None), adds_bos (whether plain text begins with bos_id by this tokenizer's own convention), table_rows (rows of the
    model's embedding table; None if it is not known), added (the rows of tokens that were added; None if none were).
    Every token that a row or a batch contains has a row of the table.
    """

    def __init__(
        self,
        backend: "PreTrainedTokenizerFast",
        *,
        name: str = "",
        extra_stop_ids: Iterable[int] = (),
        table_rows: int | None = None,
        added: AddedRows | None = None,
    ) -> None:
        """name: its name in errors. extra_stop_ids: further tokens that end an answer. added: see `add_tokens`."""
        self.backend, self.name, self.table_rows, self.added = backend, name, table_rows, added
        self._extra_stop_ids = tuple(extra_stop_ids)
        # With the limit from its files the backend would warn of every longer text; jaxft checks lengths itself.
        backend.model_max_length = int(1e30)
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        self.bos_id: int | None = backend.bos_token_id
        self.eos_id: int | None = backend.eos_token_id
        # Padding is never looked at, so any token will do, but without a row of the table it would be NaN.
        pads = (backend.pad_token_id, self.eos_id, 0)
        self.pad_id: int = next(int(i) for i in pads if i is not None and self.has_row(i))
        self.adds_bos: bool = self.bos_id is not None and backend("a")["input_ids"][:1] == [self.bos_id]
        turn_ends = set() if self.chat_template is None else _ends_of_turns(self)
        ends = {*self._extra_stop_ids, self.eos_id, *turn_ends} - {None}
        self.stop_ids: frozenset[int] = frozenset(int(i) for i in ends)

    def has_row(self, token_id: int) -> bool:
        """Whether the model's embedding table has a row for a token; True if the size of the table is not known."""
        return self.table_rows is None or token_id < self.table_rows

    def check_rows(self, ids: Iterable[int], where: str) -> None:
        """Raises DataError, naming `where`, if a token has no row in the embedding table of the model."""
        if self.has_row(self.vocab_size - 1):
            return
        absent = sorted({int(i) for i in ids if not self.has_row(i)})
        if absent:
            tokens = listed([f"{self.token(i)!r} (id {i})" for i in absent])
            raise DataError(
                f"{where}: {tokens}: the tokenizer {self.name or 'in use'} has {self.vocab_size:,} tokens, but the "
                f"embedding table of the model has {self.table_rows:,} rows, and none for "
                f"{'this token' if len(absent) == 1 else 'these tokens'}. Remove what the tokenizer reads as them from "
                "the row or the chat template, use the tokenizer files that the model was published with, or give the "
                f"tokens rows that are trained: model.add_tokens={','.join(self.token(i) for i in absent[:SHOWN])!r}."
            )

    def add_tokens(self, texts: Sequence[str]) -> "Tokenizer":
        """This tokenizer with further tokens, for a model whose tables get a row for each of them.

        texts: what the tokens stand for. Of a token that the tokenizer has, but no row of the table, only the row is
        added. Raises ConfigError for a text that is empty, named twice, or a token with a row already, and if the size
        of the model's table is not known.
        """
        from tokenizers import AddedToken  # imported only where a tokenizer is used

        before, vocabulary = self.table_rows, self.backend.get_vocab()
        if before is None:
            raise ConfigError(
                f"model.add_tokens: the size of the embedding table of {self.name} is not known, because its "
                "config.json has no vocab_size"
            )
        for text in texts:
            if not text or texts.count(text) > 1:
                raise ConfigError(f"model.add_tokens: {text!r} is {'named twice' if text else 'no text'}")
            if text in vocabulary and vocabulary[text] < before:
                raise ConfigError(
                    f"model.add_tokens: {text!r} is a token of {self.name} already, with the id {vocabulary[text]} and "
                    "a row in the embedding table: take it out of the list"
                )
        backend = copy.deepcopy(self.backend)
        backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
        tokens = [int(backend.convert_tokens_to_ids(text)) for text in texts]
        added = added_rows(tokens=tokens, size=max(backend.get_vocab().values()) + 1, before=before)
        return Tokenizer(
            backend, name=self.name, extra_stop_ids=self._extra_stop_ids, table_rows=added.rows, added=added
        )

    @property
    def chat_template(self) -> str | None:
        """The Jinja text that renders a conversation, or None."""
        return self.chat_templates.get("default")

    @property
    def chat_templates(self) -> dict[str, str]:
        """All templates by name: `default`, and some models' `tool_use`, which renders conversations with tools."""
        template = self.backend.chat_template
        if isinstance(template, Mapping):
            return dict(template)
        return {} if template is None else {"default": template}

    @functools.cached_property
    def template_variables(self) -> frozenset[str]:
        """The variables that the chat templates read, those that every rendering sets among them."""
        texts = self.chat_templates.values()
        return frozenset().union(*(template_text.reads_of(text).variables for text in texts))

    @property
    def template_date(self) -> str | None:
        """The date that the chat template shows in the place of today's, such as 2026-11-29; None if none is fixed."""
        return next((date for text in self.chat_templates.values() if (date := template_text.date_in(text))), None)

    def fix_date(self, date: str) -> None:
        """Fixes the date that the chat templates show, if they read the clock and no date is fixed in them yet.

        date: such as 2026-11-29. Raises ConfigError if a template computes the format in which it wants the date.
        """
        fixed = {name: template_text.with_date(text, date) for name, text in self.chat_templates.items()}
        if fixed != self.chat_templates:
            self.backend.chat_template = fixed if isinstance(self.backend.chat_template, Mapping) else fixed["default"]

    def with_template(self, text: str) -> "Tokenizer":
        """The same tokenizer with another chat template. text: Jinja."""
        backend = copy.copy(self.backend)
        backend.chat_template = text
        return Tokenizer(backend, name=self.name, extra_stop_ids=self._extra_stop_ids, table_rows=self.table_rows)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of text. add_special_tokens: add the tokenizer's own special tokens, such as BOS."""
        return self.backend.encode(_whole(text), add_special_tokens=add_special_tokens)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, on all cores."""
        encoded = self.backend.backend_tokenizer.encode_batch_fast([*map(_whole, texts)], add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_batch_with_spans(self, texts: Sequence[str]) -> list[tuple[list[int], Spans]]:
        """(token ids, the characters from which a token came, by its index) of each text, on all cores."""
        encoded = self.backend.backend_tokenizer.encode_batch([*map(_whole, texts)], add_special_tokens=False)
        return [(encoding.ids, encoding.token_to_chars) for encoding in encoded]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids."""
        ids = [int(i) for i in ids]
        text = self.backend.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        return str(text)  # typed as a list too, for batches

    def token(self, token_id: int) -> str:
        """The token's own spelling, such as `<|im_end|>`."""
        return self.backend.convert_ids_to_tokens([int(token_id)])[0]

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest token, as the vocabulary spells it: one for each of its bytes at least."""
        return max(map(len, self.backend.get_vocab()))

    @functools.cached_property
    def stop_tokens(self) -> dict[int, str]:
        """The spelling of each of `stop_ids`."""
        return {stop: self.token(stop) for stop in sorted(self.stop_ids)}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **kwargs: Any,
    ) -> str:
        """The conversation as text, rendered by the chat template in transformers' Jinja sandbox.

        messages: arguments of tool calls may be objects or JSON text; the template gets the form that it can print.
        kwargs are variables of the template, such as `enable_thinking`.
        Raises TemplateRefusal if the template refuses the messages; DataError if there is none, or it does not read one
        of the variables.
        """
        if (
            kwargs
            and self.chat_template is not None
            and (what := template_text.unread(kwargs, self.template_variables))
        ):
            raise DataError(f"chat_template_kwargs: {what} Leave it out.")
        if any(message.get("tool_calls") for message in messages):
            messages = template_probes.with_arguments(messages, as_text=self._arguments_as_text)
            messages = with_short_ids(messages) if self.wants_short_ids else messages
            messages = with_json_values(messages) if self.writes_python_values else messages
        return self.apply_template(messages, tools=tools, add_generation_prompt=add_generation_prompt, **kwargs)

    def apply_template(self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None, **kwargs: Any) -> str:
        """`render` for messages whose tool calls are already in the form that the template prints."""
        # jinja2 comes with transformers; both are imported only when a tokenizer is used.
        from jaxft.data.chat.budget import BudgetExceeded, budget_for
        from jaxft.data.chat.sandbox import limit_transformers

        if self.backend.chat_template is None:
            fit = ", ".join(fitting(self.backend)) or "none"
            raise DataError(
                f"the tokenizer {self.name or 'in use'} has no chat template, so it cannot render messages. "
                f"Set data.chat_template to a Jinja file, or to a built-in template that fits this tokenizer ({fit}), "
                "or use prompt/completion or text rows."
            )
        if self._random is not None:
            raise DataError(
                f"the chat template writes something else at every rendering ({self._random}), so that the model would "
                "be asked otherwise than it was trained. Set data.chat_template to a template without it."
            )
        plain, tools = [dict(message) for message in messages], list(tools) if tools else None
        limit_transformers()
        try:
            with budget_for(plain, tools, kwargs):
                text = str(self.backend.apply_chat_template(plain, tools=tools, tokenize=False, **kwargs))
        except BudgetExceeded as error:
            raise TemplateLimit(
                f"the chat template that is used with the tokenizer {self.name} was stopped: {error}. No conversation "
                "needs that, so the template is broken or hostile. Set data.chat_template (--chat_template) to another "
                "one."
            ) from error
        except Exception as error:  # a template is a program, which may fail in any way
            roles = safe_line(", ".join(str(m.get("role")) for m in messages))
            reason = "it calls itself without end" if isinstance(error, RecursionError) else error
            raise TemplateRefusal(f"the chat template refuses these messages ({roles}): {reason}") from error
        return text

    @functools.cached_property
    def wants_short_ids(self) -> bool:
        """Whether the chat template takes ids of tool calls of nine letters and digits alone, as Mistral's do."""
        return template_probes.wants_short_ids(self.apply_template)

    @functools.cached_property
    def writes_python_values(self) -> bool:
        """Whether the chat template writes true, false and null of a call as Python does, if they are not text."""
        return not self._arguments_as_text and template_probes.writes_python(self.apply_template)

    @functools.cached_property
    def _random(self) -> str | None:
        return next(
            (one for text in self.chat_templates.values() if (one := template_text.reads_of(text).random)), None
        )

    @functools.cached_property
    def _arguments_as_text(self) -> bool:
        return template_probes.wants_text(self.apply_template)

    def generation_config(self, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """generation_config.json for a model with this tokenizer: the tokens that ended answers in training end them
        in serving too. given: that of the model, whose further fields and end tokens are kept."""
        return {
            **(given or {}),
            **({"bos_token_id": self.bos_id} if self.bos_id is not None else {}),
            **eos_field(sorted({*self.stop_ids, *end_tokens(given)})),
            "pad_token_id": self.pad_id,
        }

    def save(self, folder: str | os.PathLike[str]) -> list[str]:
        """Writes files that AutoTokenizer of transformers 4 and 5 reads back; returns their names."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        written = self.backend.save_pretrained(os.fspath(folder))
        _write_for_transformers_4(Path(folder) / "tokenizer_config.json")
        return sorted(os.path.basename(path) for path in written if os.path.isfile(path))


def _whole(text: str) -> str:
    """The text. Raises DataError for half of a character, which no tokenizer can read."""
    if not text.isascii() and (half := HALF.search(text)):
        raise DataError(
            f"the text holds half of a character ({half[0]!r} at position {half.start():,}), such as a cut emoji or a "
            "byte that is not UTF-8, which no tokenizer can read: remove it, or write the whole character"
        )
    return text


def _write_for_transformers_4(path: Path) -> None:
    # transformers 4 does not know the plain class by its new name, nor a list under extra_special_tokens; 5 reads both.
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _ends_of_turns(tokenizer: Tokenizer) -> set[int]:
    """Ids of the added tokens that the chat template writes after an answer and after a tool call."""
    added = tokenizer.backend.added_tokens_decoder
    ends: set[int] = set()
    tail = template_probes.text_after_answer(tokenizer.apply_template)
    if tail is not None:
        # SentencePiece puts a space piece before the first token of any text.
        ids = tokenizer.encode(tail.lstrip())
        after = next((i for i in ids if tokenizer.decode([i], skip_special_tokens=False).strip()), None)
        ends |= {after} & added.keys() if after is not None else set()
    tail = template_probes.text_after_call(tokenizer.apply_template)
    if tail is not None:
        # Tokens that close the call itself may come before the one that ends the turn.
        ids = [i for i in tokenizer.encode(tail) if i in added and added[i].special]
        ends |= set(ids[-1:])
    return ends
