"""Generation from text or chats to text."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxft.data.chat.arrange import with_known_roles
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError
from jaxft.generation import tokens
from jaxft.generation.conversation_cache import ConversationCache
from jaxft.generation.settings import FinishReason, Generated, Sampling
from jaxft.generation.thoughts import AnswerStream, Piece, PlainStream
from jaxft.nn.decoder import Decoder

Prompt = str | Sequence[Mapping[str, Any]]
# Called with (row, piece) whenever a row has new text; a row's pieces make up its text.
OnText = Callable[[int, str], None]
WANTED = "a prompt is a text, or a list of messages such as [{'role': 'user', 'content': 'Hi'}]; give one, or a list"


class Answer(str):
    """The text of an answer.

    reasoning_content: the thoughts before it, in a chat, which are no part of it. finish_reason: `stop`, or `length` if
    it was cut off.
    """

    reasoning_content: str
    finish_reason: FinishReason

    @classmethod
    def of(cls, generated: Generated) -> "Answer":
        """What `generate_text` generated."""
        answer = cls(generated.text or "")
        answer.reasoning_content, answer.finish_reason = generated.thoughts, generated.finish_reason
        return answer


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling],
    *,
    slots: int = 32,
    on_text: OnText | None = None,
    on_thoughts: OnText | None = None,
    cache: ConversationCache | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Generated]:
    """Continues every prompt until a stop token of the tokenizer, a stop string, or max_new_tokens.

    prompts: a string is encoded with what the tokenizer adds to plain text, such as BOS; a list of messages is
    rendered by the chat template with its generation prompt. chat_template_kwargs: variables of the template. The
    other arguments are those of `generate_tokens`. on_text, on_thoughts: called when the answer, or the thoughts before
    it, have grown; the answer to a text has no thoughts apart. Stop strings end the answer, not its thoughts. The
    tokens and logprobs of the results include those of thoughts and of a stop string.
    Raises DataError for messages that the template refuses, and as `generate_tokens` does.
    """
    samplings = tokens.one_each(sampling, len(prompts))
    encoded = [encode_prompt(tokenizer, prompt, **(chat_template_kwargs or {})) for prompt in prompts]
    streams = [
        PlainStream(tokenizer, one.stop) if isinstance(prompt, str) else AnswerStream(tokenizer, ids, one.stop)
        for prompt, ids, one in zip(prompts, encoded, samplings, strict=True)
    ]

    def show(row: int, piece: Piece) -> None:
        if piece.answer and on_text is not None:
            on_text(row, piece.answer)
        if piece.thoughts and on_thoughts is not None:
            on_thoughts(row, piece.thoughts)

    def on_token(row: int, token: int, logprob: float) -> bool:
        if token in tokenizer.stop_ids:
            return True
        show(row, streams[row].push(token))
        return streams[row].stopped

    # Longer runs on the device are faster, so callbacks are only used if something reads the text as it comes.
    watched = on_text is not None or on_thoughts is not None or any(s.stop for s in samplings)
    results = tokens.run(
        model,
        encoded,
        samplings,
        stop_ids=tokenizer.stop_ids,
        slots=slots,
        on_token=on_token if watched else None,
        cache=cache,
    )
    for row, (stream, result) in enumerate(zip(streams, results, strict=True)):
        for token in () if watched else result.tokens:
            on_token(row, token, 0.0)
        show(row, stream.finish())
    return [
        dataclasses.replace(result, text=stream.text, thoughts=stream.thoughts)
        for result, stream in zip(results, streams, strict=True)
    ]


def as_prompts(given: Any) -> tuple[list[Prompt], bool]:
    """(prompts, whether it is a single one) of what somebody gives as prompts.

    given: one prompt, which is a text or a list of messages, or several of them. Raises DataError for anything else.
    """
    if isinstance(given, str):
        return [given], True
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise DataError(f"prompts is {_kind(given)}: {WANTED}")
    listed_prompts = list(given)
    if listed_prompts and all(isinstance(one, Mapping) for one in listed_prompts):
        return [_conversation(listed_prompts, "the conversation")], True
    return [
        one if isinstance(one, str) else _conversation(one, f"prompt {number}")
        for number, one in enumerate(listed_prompts)
    ], False


def _conversation(given: Any, name: str) -> list[Mapping[str, Any]]:
    if isinstance(given, Mapping | bytes) or not isinstance(given, Sequence) or not given:
        raise DataError(f"{name} is {_kind(given)}: {WANTED}")
    for number, message in enumerate(given, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"message {number} of {name} is {_kind(message)}, not an object with role and content")
    return list(given)


def _kind(value: Any) -> str:
    return f"{type(value).__name__} ({str(value)[:60]!r})"


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, **variables: Any) -> list[int]:
    """Token ids of a string or of a list of messages, as the model expects them before its answer.

    variables: of the chat template. Raises DataError for messages that the template refuses.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special_tokens=True)
    # The template has already written BOS and the like.
    messages = with_known_roles(prompt, tokenizer)
    return tokenizer.encode(tokenizer.render(messages, add_generation_prompt=True, **variables))
