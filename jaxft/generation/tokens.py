"""Generation from token ids to token ids."""

from collections.abc import Callable, Collection, Sequence

from jaxft.errors import ConfigError, DataError, ModelError, listed
from jaxft.generation import engine
from jaxft.generation.conversation_cache import ConversationCache
from jaxft.generation.request import OnEnd, Request
from jaxft.generation.request import OnToken as OnOwnToken
from jaxft.generation.settings import Generated, Sampling
from jaxft.nn.decoder import Decoder
from jaxft.nn.virtual import virtual_ids

# Called with (row, token, logprob) for every token, a row's own in order; True ends the row.
OnToken = Callable[[int, int, float], bool | None]
# Called with (number of the prompt, its answers) as soon as all answers of a prompt have ended.
OnGroup = Callable[[int, list[Generated]], None]
NAMED = 5  # rows named in one error


def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling | Sequence[Sampling],
    stop_ids: Collection[int] = (),
    slots: int = 32,
    on_token: OnToken | None = None,
    cache: ConversationCache | None = None,
    answers: int = 1,
    length: int | None = None,
    tempered_logprobs: bool = False,
    on_group: OnGroup | None = None,
    streams: Sequence[int] | None = None,
    keep_slots: bool = False,
    between: Callable[[], None] = lambda: None,
) -> list[Generated]:
    """Continues every prompt; results are in the order of the prompts.

    model: with or without adapters. sampling: one for all prompts or one for each. stop_ids: tokens that end a row and
    are its last token. slots: most rows decoded at a time; memory grows with slots times the longest row. on_token:
    called with (row, token, logprob) for every token, a few steps after it was made; True ends the row. cache: for a
    single prompt, the KV cache kept between the turns of a conversation: tokens that the prompt shares with the last
    call of the same model and parameters are not computed again. answers: number of answers to each prompt. The
    results, and rows of `on_token`, are then those of every prompt in turn; a prompt is computed once for all its
    answers. length: most tokens of a row, prompt and answer: calls with the same length are compiled once, whatever
    their prompts; by default, of the longest row. tempered_logprobs: whether log-probabilities are those under the
    temperature of sampling, instead of the model's own at 1. on_group: called with (number of the prompt, its answers)
    once all answers of a prompt have ended, while those of others may not have. Generation waits until it returns, so
    long work belongs into another thread or process.

    Row i draws with the seed of its Sampling and stream i, or the i-th of `streams`. keep_slots: whether a call with
    fewer rows has `slots` too, and so the shape of one with more. between: called before every few tokens; what it
    raises ends the call. Calls of similar shapes reuse compiled functions. Parameters on a mesh are first copied into
    the layout for generation (`generation.layout.for_decoding`), in which rows and heads are split, and no token
    gathers weights. Nothing but `cache` keeps the parameters or their copy after the call. Raises DataError for prompts
    that are empty, contain ids outside the vocabulary, or exceed the model's positions together with max_new_tokens;
    ConfigError for settings that contradict each other, and for `cache` with several prompts.
    """
    if answers < 1:
        raise ConfigError(f"answers={answers} must be at least 1")
    prompts = [prompt for prompt in prompts for _ in range(answers)]
    samplings = one_each(sampling, len(prompts))
    _refuse_stop_strings(samplings)
    return run(
        model,
        prompts,
        samplings,
        stop_ids=stop_ids,
        slots=slots,
        on_token=on_token,
        cache=cache,
        answers=answers,
        length=length,
        tempered_logprobs=tempered_logprobs,
        on_group=on_group,
        streams=streams,
        keep_slots=keep_slots,
        between=between,
    )


def run(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    *,
    stop_ids: Collection[int],
    slots: int,
    on_token: OnToken | None,
    cache: ConversationCache | None = None,
    answers: int = 1,
    length: int | None = None,
    tempered_logprobs: bool = False,
    on_group: OnGroup | None = None,
    streams: Sequence[int] | None = None,
    keep_slots: bool = False,
    between: Callable[[], None] = lambda: None,
) -> list[Generated]:
    """`generate_tokens` for a caller that handles stop strings itself. prompts: one for each answer."""
    _check(model, prompts, samplings, slots, length)
    if not prompts:
        return []
    if cache is not None and len(prompts) > 1:
        raise ConfigError(f"cache is for one conversation, and there are {len(prompts)} prompts: leave it out")
    first = virtual_ids(model.virtual_tokens)
    requests = [
        Request(
            id=row,
            prompt=(*first, *map(int, prompt)),
            sampling=sampling,
            stream=stream,
            tempered=tempered_logprobs,
            on_token=None if on_token is None else _of_row(on_token, row),
        )
        for row, (prompt, sampling, stream) in enumerate(
            zip(prompts, samplings, streams or range(len(prompts)), strict=True)
        )
    ]
    running = engine.start(
        model,
        requests,
        stop_ids=stop_ids,
        slots=slots,
        cache=cache,
        answers=answers,
        length=length,
        keep_slots=keep_slots,
    )
    if on_group is not None:
        on_end = _by_group(requests, answers, on_group)
        for request in requests:
            request.on_end = on_end
    running.run(requests, between)
    if cache is not None:
        running.save_cache(requests[0], cache)
    return [_result(request) for request in requests]


def _of_row(on_token: OnToken, row: int) -> OnOwnToken:
    return lambda token, logprob, _: on_token(row, token, logprob)


def _by_group(requests: Sequence[Request], answers: int, on_group: OnGroup) -> OnEnd:
    """Calls on_group when the last of a prompt's requests ends."""
    left = [answers] * (len(requests) // answers)

    def on_end(request: Request) -> None:
        group = request.id // answers
        left[group] -= 1
        if not left[group]:
            first = group * answers
            on_group(group, [_result(one) for one in requests[first : first + answers]])

    return on_end


def one_each(sampling: Sampling | Sequence[Sampling], prompts: int) -> list[Sampling]:
    """A Sampling for each prompt. Raises ConfigError if a list has another length."""
    samplings = [sampling] * prompts if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != prompts:
        raise ConfigError(f"{len(samplings)} samplings for {prompts} prompts: give one for all or one for each")
    return samplings


def _refuse_stop_strings(samplings: Sequence[Sampling]) -> None:
    if any(s.stop for s in samplings):
        raise ConfigError(
            "stop strings are searched in text: use generate_text, or an on_token that returns True to end a row"
        )


def _result(request: Request) -> Generated:
    if request.finish_reason is None:
        raise RuntimeError(f"row {request.id} has no finish_reason: the engine stopped before it ended")
    return Generated(
        tokens=tuple(request.tokens), logprobs=tuple(request.logprobs), finish_reason=request.finish_reason
    )


def _check(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    samplings: Sequence[Sampling],
    slots: int,
    length: int | None = None,
) -> None:
    if model.config.head == "score":
        raise ModelError(
            "this is a reward model: it has a score head in place of the LM head, so it generates nothing. Score "
            "answers with it by `jaxft score`."
        )
    if slots < 1:
        raise ConfigError(f"slots={slots} must be at least 1")
    empty = [row for row, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise DataError(
            f"{len(empty)} of {len(prompts)} prompts are empty (rows {listed(empty, NAMED)}): a model continues at "
            "least one token, such as BOS"
        )
    config = model.config
    limit = min(config.max_position_embeddings, length or config.max_position_embeddings) - model.virtual_tokens
    long = [
        f"row {row}: {len(prompt)} + {s.max_new_tokens} = {len(prompt) + s.max_new_tokens}"
        for row, (prompt, s) in enumerate(zip(prompts, samplings, strict=True))
        if len(prompt) + s.max_new_tokens > limit
    ]
    if long:
        most = f"the model's {limit} positions" if length is None else f"length={limit}"
        raise DataError(
            f"{len(long)} of {len(prompts)} prompts with their max_new_tokens exceed {most} "
            f"({listed(long, NAMED)}). Shorten the prompts or lower max_new_tokens."
        )
    strange = [row for row, prompt in enumerate(prompts) if min(prompt) < 0 or max(prompt) >= config.vocab_size]
    if strange:
        raise DataError(
            f"{len(strange)} of {len(prompts)} prompts contain token ids outside 0..{config.vocab_size - 1} "
            f"(rows {listed(strange, NAMED)}): they come from another model's tokenizer"
        )
