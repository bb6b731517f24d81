"""What would make a row trainable that the chat template does not fit, tried out on the row.

A template can fail a row in many ways, and the same change of settings does not help against all of them. So the error
names what helped when it was tried on the first row with the problem.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

from jaxft.config import DataConfig
from jaxft.data.formats import Conversation
from jaxft.data.tokenizers.templates import BUILT_IN, EOS, built_in, fitting
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError

# Raises DataError if a row cannot be trained on.
Encode = Callable[[Conversation, Tokenizer, DataConfig], object]
THINKING = ("enable_thinking", "thinking")  # variables by which templates switch thoughts off
NAMED = 2  # mends that an error names
LEAVE_OUT = "data.bad_rows='skip' leaves such rows out"


class TemplateProblem(DataError):
    """A row that a chat template does not fit.

    what: whole sentences that name the row. mend: what to do if nothing that is tried helps, as a sentence. kind: tells
    problems apart that need different mends.
    """

    def __init__(self, what: str, mend: str, *, kind: str) -> None:
        super().__init__(f"{what} {mend}")
        self.what, self.mend, self.kind = what, mend, kind


class Mends:
    """Tries settings on rows that cannot be encoded, once for each kind of problem."""

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, encode: Encode) -> None:
        self._tokenizer, self._config, self._encode = tokenizer, config, encode
        self._known: dict[str, str] = {}

    def explained(self, error: DataError, conversation: Conversation) -> DataError:
        """The error, with what helps against it. conversation: the row, as it was read."""
        if not isinstance(error, TemplateProblem):
            return error
        if error.kind not in self._known:
            self._known[error.kind] = self._tried(conversation) or error.mend
        return DataError(f"{error.what} {self._known[error.kind]}")

    def whole_with(self, conversation: Conversation) -> str | None:
        """The built-in template with which a row is one sequence; None if there is none, or it has no marks."""
        for name in self._built_in:
            try:
                examples = self._encode(conversation, self._with(name), self._config)
            except DataError:
                continue
            if isinstance(examples, list) and len(examples) == 1:
                return name
        return None

    @functools.cached_property
    def _built_in(self) -> list[str]:
        return [name for name in fitting(self._tokenizer.backend) if BUILT_IN[name] != (EOS,)]

    @functools.cache  # noqa: B019  as long as one set is encoded
    def _with(self, name: str) -> Tokenizer:
        return self._tokenizer.with_template(built_in(name))

    def _tried(self, conversation: Conversation) -> str | None:
        helpful = []
        for mend, changed, tokenizer, config in self._candidates(conversation):
            try:
                self._encode(changed, tokenizer, config)
            except DataError:
                continue
            helpful.append(mend)
            if len(helpful) == NAMED:
                break
        return f"This helps: {'; or '.join(helpful)}. Otherwise {LEAVE_OUT}." if helpful else None

    def _candidates(self, row: Conversation) -> Iterator[tuple[str, Conversation, Tokenizer, DataConfig]]:
        tokenizer, config = self._tokenizer, self._config
        for name in THINKING:
            if name in tokenizer.template_variables:
                kwargs = {**row.template_kwargs, name: False}
                mend = f"data.chat_template_kwargs={{'{name}': False}}, which prompts without thoughts"
                yield mend, replace(row, template_kwargs=kwargs), tokenizer, config
        bare = tuple(m | {"content": m["content"].lstrip()} if m["role"] == "assistant" else m for m in row.messages)
        if bare != row.messages:
            yield "remove the white space at the start of answers", replace(row, messages=bare), tokenizer, config
        if not config.merge_turns:
            mend = "data.merge_turns=True, which joins consecutive messages of the same role"
            yield mend, row, tokenizer, replace(config, merge_turns=True)
        if config.reasoning == "keep":
            inline = "data.reasoning='inline', which writes thoughts into the content as a <think> block"
            yield inline, row, tokenizer, replace(config, reasoning="inline")
            yield (
                "data.reasoning='drop', which trains without thoughts",
                row,
                tokenizer,
                replace(config, reasoning="drop"),
            )
        for name in self._built_in:
            mend = f"data.chat_template='{name}', a template that comes with jaxft, for training and in the exports"
            yield mend, row, self._with(name), config
