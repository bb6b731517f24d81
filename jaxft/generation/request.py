"""One prompt on its way through the engine, and its answer so far."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from jaxft.generation.settings import FinishReason, Sampling

TopTokens = tuple[tuple[int, float], ...]  # the most likely tokens in one position, and their log-probabilities
# Called with (token, logprob, the most likely tokens there) for every token, in order; True ends the answer.
OnToken = Callable[[int, float, TopTokens], bool | None]
OnEnd = Callable[["Request"], None]


@dataclass(kw_only=True)
class Request:
    """One prompt and its answer so far.

    id: unique among the requests of an engine. stream: of its random numbers; requests with the same seed draw
    differently if their streams differ. adapter: the number of its adapter; 0 for none. alternatives: how many of the
    most likely tokens are reported with each token. tempered: whether its log-probabilities are those under the
    temperature of sampling. on_end: called once, when the request has its finish_reason or is cancelled. Callbacks run
    between dispatches to the devices; an error in one ends the step for all requests.

    top: the most likely tokens with each token; empty if alternatives is 0. finish_reason: None until the answer ends,
    and of a request that was cancelled.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling
    stream: int = 0
    adapter: int = 0
    alternatives: int = 0
    tempered: bool = False
    on_token: OnToken | None = None
    on_end: OnEnd | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopTokens] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cancelled: bool = False

    @property
    def ended(self) -> bool:
        """Whether no more tokens will come."""
        return self.cancelled or self.finish_reason is not None

    def add(self, token: int, logprob: float, top: TopTokens, stop_ids: Collection[int]) -> None:
        """Adds a token, and sets finish_reason if it was the last one."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.alternatives:
            self.top.append(top[: self.alternatives])
        ended_by_caller = self.on_token is not None and bool(self.on_token(token, logprob, top[: self.alternatives]))
        if ended_by_caller or token in stop_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.sampling.max_new_tokens:
            self.finish_reason = "length"
