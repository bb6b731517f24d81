"""Generation until stop texts, as lm-evaluation-harness asks for it, on jaxft's generation engine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ConfigError
from jaxft.generation import tokens
from jaxft.generation.detokenize import TextStream
from jaxft.generation.settings import Sampling
from jaxft.nn.decoder import Decoder

SETTINGS = ("top_k", "top_p", "min_p", "repetition_penalty")
# Settings of transformers that say what is done anyway.
WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,), "use_cache": (True, False), "num_return_sequences": (1,), "early_stopping": (True, False),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt as token ids, how it is answered, and the texts that end its answer."""

    prompt: list[int]
    sampling: Sampling
    until: tuple[str, ...]


def sampling_of(settings: Mapping[str, Any], seed: int) -> Sampling:
    """The settings of lm-eval, normalised by it, as ours. Raises ConfigError for one that jaxft does not have."""
    given = dict(settings)
    most, temperature = int(given.pop("max_gen_toks")), float(given.pop("temperature", 0.0) or 0.0)
    given.pop("until", None)
    given.pop("do_sample", None)
    own = {name: given.pop(name) for name in SETTINGS if given.get(name) is not None}
    for name, value in given.items():
        if value is not None and value not in WITHOUT_EFFECT.get(name, ()):
            raise ConfigError(
                f"the task sets {name}={value!r} for generation, which jaxft does not have: set it to another value by "
                f"--gen_kwargs, or leave the task out. Known: max_gen_toks, temperature, {', '.join(SETTINGS)}."
            )
    if not temperature:
        own = {name: value for name, value in own.items() if name == "repetition_penalty"}
    if own.get("top_k") == 0:  # of transformers: no limit
        del own["top_k"]
    return Sampling(max_new_tokens=most, temperature=temperature, seed=seed, **own)


def answers_to(model: Decoder, tokenizer: Tokenizer, questions: Sequence[Question], slots: int) -> list[str]:
    """The text of each answer before the first of its stop texts, without special tokens, in order.

    slots: answers that are decoded at a time. A stop text that is a token of its own ends an answer as a token.
    """
    special = [_special(tokenizer, question.until) for question in questions]
    streams = [TextStream(tokenizer, question.until) for question in questions]

    def on_token(row: int, token: int, logprob: float) -> bool:
        if token in special[row]:
            return True
        streams[row].push(token)
        return streams[row].stopped

    results = tokens.run(
        model,
        [question.prompt for question in questions],
        [question.sampling for question in questions],
        stop_ids=tokenizer.stop_ids,
        slots=slots,
        on_token=on_token,
    )
    return [
        _cut(tokenizer.decode(result.tokens), question.until)
        for question, result in zip(questions, results, strict=True)
    ]


def _special(tokenizer: Tokenizer, until: Sequence[str]) -> frozenset[int]:
    """The special tokens among the stop texts: decoding would leave them out."""
    added = tokenizer.backend.added_tokens_decoder
    encoded = [tokenizer.encode(text) for text in until if text]
    return frozenset(ids[0] for ids in encoded if len(ids) == 1 and ids[0] in added)


def _cut(text: str, until: Sequence[str]) -> str:
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text
