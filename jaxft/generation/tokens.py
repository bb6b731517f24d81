"""Generation from token ids to token ids."""

from collections.abc import Collection, Sequence
from typing import Any

from flax import nnx

from jaxft.errors import ConfigError, DataError
from jaxft.generation import engine
from jaxft.generation.held import ConversationCache
from jaxft.generation.settings import Generated, Sampling
from jaxft.nn.virtual import virtual_ids

LISTED = 5  # rows named in one error


def generate_tokens(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling],
    stop_ids: Collection[int] = (),
    slots: int = 32,
    on_token: engine.OnToken | None = None,
    held: ConversationCache | None = None,
) -> list[Generated]:
    """Continues every prompt; results in the order of the prompts.

    model: a Decoder, with or without adapters. sampling: one for all prompts or one for each. stop_ids: tokens
    that end a row, of which they are the last token then. slots: most rows decoded at a time; memory grows with
    slots times the longest row. on_token: called with (row, token, logprob) for every token, a few steps after
    it was made; returning True ends the row. held: of a single prompt, the cache is left there for the next call with
    the same model and parameters; what a prompt shares with what is held is not computed again.

    Row i draws with the seed of its Sampling and stream i. Calls of like shapes reuse what was compiled,
    whatever the parameters and settings. Parameters on a mesh: rows are split over its batch axes.
    Raises DataError for prompts that are empty, hold ids outside the vocabulary, or are too long with
    max_new_tokens for the model's positions; ConfigError for settings that do not fit together, and for `held` with
    several prompts.
    """
    samplings = one_each(sampling, len(prompts))
    if any(s.stop for s in samplings):
        raise ConfigError(
            "stop strings are found in text: use generate_text, or an on_token that returns True to end a row"
        )
    return run(model, prompts, samplings, stop_ids=stop_ids, slots=slots, on_token=on_token, held=held)


def run(
    model: nnx.Module,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    stop_ids: Collection[int],
    slots: int,
    on_token: engine.OnToken | None,
    held: ConversationCache | None = None,
) -> list[Generated]:
    """`generate_tokens` where the caller looks after stop strings."""
    _check(model, prompts, samplings, slots)
    if not prompts:
        return []
    if held is not None and len(prompts) > 1:
        raise ConfigError(
            f"held keeps the cache of one conversation, and there are {len(prompts)} prompts: leave it out"
        )
    first = virtual_ids(model.virtual_tokens)
    jobs = [
        engine.Job(row=row, prompt=(*first, *map(int, prompt)), sampling=sampling)
        for row, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    started = engine.start(model, jobs, stop_ids=stop_ids, slots=slots, held=held)
    started.run(jobs, on_token)
    if held is not None:
        started.leave(jobs[0], held)
    return [
        Generated(tokens=tuple(job.tokens), logprobs=tuple(job.logprobs), finish_reason=job.finish_reason)
        for job in jobs
    ]


def one_each(sampling: Sampling | Sequence[Sampling], prompts: int) -> list[Sampling]:
    """A Sampling for each prompt. Raises ConfigError where a list has another length."""
    samplings = [sampling] * prompts if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != prompts:
        raise ConfigError(f"{len(samplings)} samplings for {prompts} prompts: give one for all or one for each")
    return samplings


def _check(model: Any, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], slots: int) -> None:
    if slots < 1:
        raise ConfigError(f"slots={slots} must be at least 1")
    empty = [row for row, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(prompts)} prompts are empty (rows {_some(empty)}): a model continues at least "
            "one token, such as BOS"
        )
    config = model.config
    limit = config.max_position_embeddings - model.virtual_tokens
    long = [
        f"row {row}: {len(prompt)} + {s.max_new_tokens} = {len(prompt) + s.max_new_tokens}"
        for row, (prompt, s) in enumerate(zip(prompts, samplings, strict=True))
        if len(prompt) + s.max_new_tokens > limit
    ]
    if long:
        raise DataError(
            f"{len(long)} of {len(prompts)} prompts with their max_new_tokens exceed the model's {limit} positions "
            f"({_some(long)}). Shorten the prompts or lower max_new_tokens."
        )
    strange = [row for row, prompt in enumerate(prompts) if min(prompt) < 0 or max(prompt) >= config.vocab_size]
    if strange:
        raise DataError(
            f"{len(strange)} of {len(prompts)} prompts hold token ids outside 0..{config.vocab_size - 1} "
            f"(rows {_some(strange)}): they come from another model's tokenizer"
        )


def _some(items: Sequence[Any]) -> str:
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(map(str, items[:LISTED])) + more
