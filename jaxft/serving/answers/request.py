"""A request for answers, checked field by field."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxft.serving.answers import fields
from jaxft.serving.answers.messages import parse_messages
from jaxft.serving.answers.tools import parse_tools
from jaxft.serving.http.bodies import number_field, object_field, refuse_unknown, text_field, whole_field
from jaxft.serving.http.errors import ApiError, bad_request

Kind = Literal["chat", "completion"]
MOST_CHOICES, MOST_STOPS, STOP_CHARACTERS, MOST_TOP = 16, 4, 1000, 20
COMPLETION_TOKENS, COMPLETION_TOP = 16, 5  # of completions, whose answers are short unless the client says otherwise
MOST_PROMPTS, MOST_TOKENS = 128, 10_000_000
SEEDS = 2**32
# Variables of chat templates that a request may set; their values are short.
VARIABLES, VARIABLE_CHARACTERS = ("enable_thinking", "thinking", "reasoning_effort"), 100


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How answers are drawn. max_tokens: None for all that the context has room for. n: answers to a prompt.

    seed: below 2^32. logprobs: whether those of the tokens are told; alternatives: of how many likely ones besides.
    """

    max_tokens: int | None
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    alternatives: int = 0


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """What a client asks for: a chat, or the continuation of prompts, which are texts or token ids.

    tools: those that the model may call. variables: of the chat template.
    """

    kind: Kind
    model: str
    settings: Settings
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str | tuple[int, ...], ...] = ()
    stream: bool = False
    include_usage: bool = False

    @property
    def choices(self) -> int:
        """How many answers it asks for."""
        return self.settings.n * max(1, len(self.prompts))


def parse_chat(values: Mapping[str, Any]) -> AnswerRequest:
    """The request in a body of chat/completions. Raises ApiError 400 for what is unknown, missing or not served."""
    fields.check_names(values, fields.CHAT)
    tools = parse_tools(values.get("tools"), values.get("tool_choice"))
    given = [whole_field(values, name, 1, MOST_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    if None not in given and given[0] != given[1]:
        raise bad_request("max_completion_tokens and max_tokens differ: give one.", "max_tokens")
    logprobs = _flag(values, "logprobs")
    top = whole_field(values, "top_logprobs", 0, MOST_TOP)
    if top and not logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs")
    limit = given[0] if given[0] is not None else given[1]
    stream, include_usage = _streaming(values)
    return AnswerRequest(
        kind="chat",
        model=_model(values),
        settings=_settings(values, limit, logprobs=logprobs, alternatives=top or 0),
        messages=parse_messages(values.get("messages")),
        tools=tools,
        variables=_variables(values),
        stream=stream,
        include_usage=include_usage,
    )


def parse_completion(values: Mapping[str, Any]) -> AnswerRequest:
    """The request in a body of completions. Raises ApiError 400 for what is unknown, missing or not served."""
    fields.check_names(values, fields.COMPLETION)
    limit = whole_field(values, "max_tokens", 1, MOST_TOKENS)
    top = whole_field(values, "logprobs", 0, COMPLETION_TOP)
    settings = _settings(
        values, COMPLETION_TOKENS if limit is None else limit, logprobs=top is not None, alternatives=top or 0
    )
    stream, include_usage = _streaming(values)
    return AnswerRequest(
        kind="completion",
        model=_model(values),
        settings=settings,
        prompts=_prompts(values.get("prompt")),
        stream=stream,
        include_usage=include_usage,
    )


def _model(values: Mapping[str, Any]) -> str:
    return text_field(values, "model", required=True, most=500) or ""


def _settings(values: Mapping[str, Any], limit: int | None, *, logprobs: bool, alternatives: int) -> Settings:
    seed = whole_field(values, "seed", -(2**63), 2**63 - 1)
    return Settings(
        max_tokens=limit,
        n=whole_field(values, "n", 1, MOST_CHOICES) or 1,
        temperature=number_field(values, "temperature", 0.0, 2.0, 1.0),
        top_p=_top_p(values),
        top_k=whole_field(values, "top_k", 1, MOST_TOKENS),
        min_p=_min_p(values),
        repetition_penalty=number_field(values, "repetition_penalty", 0.01, 100.0, 1.0),
        seed=secrets.randbelow(SEEDS) if seed is None else seed % SEEDS,
        stop=_stops(values.get("stop")),
        logprobs=logprobs,
        alternatives=alternatives,
    )


def _top_p(values: Mapping[str, Any]) -> float:
    top_p = number_field(values, "top_p", 0.0, 1.0, 1.0)
    if top_p == 0:
        raise bad_request(
            "top_p must be above 0, and at most 1. For the most likely token, give temperature 0.", "top_p"
        )
    return top_p


def _min_p(values: Mapping[str, Any]) -> float | None:
    min_p = number_field(values, "min_p", 0.0, 1.0, 0.0)
    if min_p == 1:
        raise bad_request("min_p must be at least 0 and below 1.", "min_p")
    return min_p or None


def _stops(value: Any) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    fits = isinstance(texts, list) and len(texts) <= MOST_STOPS
    if not fits or not all(isinstance(one, str) and 0 < len(one) <= STOP_CHARACTERS for one in texts):
        raise bad_request(
            f"stop must be a text, or at most {MOST_STOPS} of them, each of 1 to {STOP_CHARACTERS:,} characters.",
            "stop",
        )
    return tuple(texts)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    if value is None:
        raise bad_request("The field prompt is missing.", "prompt")
    if isinstance(value, str) or (isinstance(value, list) and value and _is_token(value[0])):
        value = [value]
    if not isinstance(value, list) or not 0 < len(value) <= MOST_PROMPTS:
        raise _bad_prompt()
    return tuple(map(_prompt, value))


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(map(_is_token, value)):
        return tuple(value)
    raise _bad_prompt()


def _bad_prompt() -> ApiError:
    return bad_request(
        f"prompt must be a text, a list of token ids, or a list of at most {MOST_PROMPTS} of either.", "prompt"
    )


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _variables(values: Mapping[str, Any]) -> dict[str, Any]:
    given = object_field(values, "chat_template_kwargs")
    refuse_unknown(given, VARIABLES, "chat_template_kwargs.")
    for name, value in given.items():
        if not isinstance(value, bool | int | float | str | None) or len(str(value)) > VARIABLE_CHARACTERS:
            raise bad_request(
                f"chat_template_kwargs.{name} must be true, false, a number or a short text.", "chat_template_kwargs"
            )
    return {name: value for name, value in given.items() if value is not None}


def _streaming(values: Mapping[str, Any]) -> tuple[bool, bool]:
    """(whether the answers come as a stream, whether its last chunk has the usage)."""
    stream, options = _flag(values, "stream"), object_field(values, "stream_options")
    if options and not stream:
        raise bad_request("stream_options needs stream: true.", "stream_options")
    refuse_unknown(options, ("include_usage", "include_obfuscation"), "stream_options.")
    if options.get("include_obfuscation"):
        raise bad_request("stream_options.include_obfuscation is not served: leave it out.", "stream_options")
    return stream, _flag(options, "include_usage", "stream_options.")


def _flag(values: Mapping[str, Any], name: str, within: str = "") -> bool:
    value = values.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad_request(f"{within}{name} must be true or false.", within + name)
    return bool(value)
