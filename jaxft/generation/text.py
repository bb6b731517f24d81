"""Generation from text or chats to text."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.generation import tokens
from jaxft.generation.conversation_cache import ConversationCache
from jaxft.generation.detokenize import TextStream
from jaxft.generation.settings import Generated, Sampling
from jaxft.nn.decoder import Decoder

Prompt = str | Sequence[Mapping[str, Any]]
# Called with (row, piece) whenever a row has new text; a row's pieces make up its text.
OnText = Callable[[int, str], None]


def generate_text(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling],
    *,
    slots: int = 32,
    on_text: OnText | None = None,
    cache: ConversationCache | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Generated]:
    """Continues every prompt until a stop token of the tokenizer, a stop string, or max_new_tokens.

    prompts: a string is encoded with what the tokenizer adds to plain text, such as BOS; a list of messages is
    rendered by the chat template with its generation prompt. chat_template_kwargs: variables of the template. The
    other arguments are those of `generate_tokens`. The tokens and logprobs of the results include those of a stop
    string, the text does not.
    Raises DataError for messages that the template refuses, and as `generate_tokens` does.
    """
    samplings = tokens.one_each(sampling, len(prompts))
    streams = [TextStream(tokenizer, s.stop) for s in samplings]

    def on_token(row: int, token: int, logprob: float) -> bool:
        if token in tokenizer.stop_ids:
            return True
        piece = streams[row].push(token)
        if piece and on_text is not None:
            on_text(row, piece)
        return streams[row].stopped

    # Longer runs on the device are faster, so callbacks are only used if something reads the text as it comes.
    watched = on_text is not None or any(s.stop for s in samplings)
    results = tokens.run(
        model,
        [encode_prompt(tokenizer, prompt, **(chat_template_kwargs or {})) for prompt in prompts],
        samplings,
        stop_ids=tokenizer.stop_ids,
        slots=slots,
        on_token=on_token if watched else None,
        cache=cache,
    )
    if not watched:
        for row, result in enumerate(results):
            for token in result.tokens:
                on_token(row, token, 0.0)
    for row, stream in enumerate(streams):
        rest = stream.finish()
        if rest and on_text is not None:
            on_text(row, rest)
    return [dataclasses.replace(r, text=stream.text) for r, stream in zip(results, streams, strict=True)]


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, **variables: Any) -> list[int]:
    """Token ids of a string or of a list of messages, as the model expects them before its answer.

    variables: of the chat template. Raises DataError for messages that the template refuses.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt, add_special_tokens=True)
    # The template has already written BOS and the like.
    return tokenizer.encode(tokenizer.render(prompt, add_generation_prompt=True, **variables))
