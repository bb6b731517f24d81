"""The fields of requests for answers: which are read, which have no effect, and which are refused, and why."""

from collections.abc import Mapping
from typing import Any

from jaxft.errors import did_you_mean
from jaxft.serving.http.bodies import SHOWN
from jaxft.serving.http.errors import bad_request

SAMPLING = (
    "max_tokens", "temperature", "top_p", "n", "stop", "seed", "logprobs", "stream", "stream_options", "top_k", "min_p",
    "repetition_penalty",
)  # fmt: skip
CHAT = (
    "model", "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice", "chat_template_kwargs",
    *SAMPLING,
)  # fmt: skip
COMPLETION = ("model", "prompt", *SAMPLING)
# Taken, since nothing that an answer consists of depends on them.
WITHOUT_EFFECT = ("user", "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention", "verbosity")
# Taken with the values that ask for what happens anyway; the first ones are what the SDK's types call the default.
HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "service_tier": ("auto", "default"), "store": (False,), "modalities": (["text"],),
    "response_format": ({"type": "text"},), "parallel_tool_calls": (True,), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,), "echo": (False,), "best_of": (1,), "suffix": ("",),
    "functions": ([],),
}  # fmt: skip
LATER = (
    "response_format", "parallel_tool_calls", "logit_bias", "presence_penalty", "frequency_penalty", "echo", "best_of",
)  # fmt: skip
NEVER: Mapping[str, str] = {
    "images": "this server answers texts", "audio": "it answers texts", "modalities": "only 'text'",
    "prediction": "leave it out", "web_search_options": "the server fetches nothing", "functions": "give tools",
    "function_call": "give tool_choice", "store": "no answer is kept here", "suffix": "texts go on at their end",
    "service_tier": "there is one tier: leave it out, or give 'auto'",
    "reasoning_effort": "give it in chat_template_kwargs, if the model's template reads it",
}  # fmt: skip


def check_names(values: Mapping[str, Any], read: tuple[str, ...]) -> None:
    """Raises ApiError 400 for a field that is not served, or not known, unless it is null or asks for nothing.

    read: the fields of the endpoint.
    """
    known = [*read, *WITHOUT_EFFECT, *HARMLESS]
    for name, value in values.items():
        if value is None or name in read or name in WITHOUT_EFFECT or value in HARMLESS.get(name, ()):
            continue
        shown = name[:SHOWN]
        if name in LATER:
            raise bad_request(f"{shown} is not served yet: leave it out.", shown, "unsupported_parameter")
        if name in NEVER:
            raise bad_request(f"{shown} is not served: {NEVER[name]}.", shown, "unsupported_parameter")
        raise bad_request(f"Unknown field {shown!r}.{did_you_mean(shown, known)}", shown, "unknown_parameter")
