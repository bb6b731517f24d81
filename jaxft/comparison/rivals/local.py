"""What answers prompts in a comparison: a model on this machine, a run's tuned model, or an endpoint elsewhere."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from jaxft.comparison.prompts import OWN, SystemPrompt, check_room, prompt_tokens
from jaxft.comparison.rivals.cache import AnswerCache, digest_of
from jaxft.comparison.rivals.peak import peak_bytes
from jaxft.comparison.rivals.speed import MEASURED, call_seconds, memory, shared
from jaxft.comparison.rivals.states import log_probabilities, mean_states
from jaxft.comparison.rows import Row
from jaxft.config import RunConfig
from jaxft.data import Tokenizer
from jaxft.files.run_folder import ANSWERS
from jaxft.generation.tokens import OnToken
from jaxft.nn.decoder import Decoder
from jaxft.runs.scores.answers import AnsweredRow, answer_prompts, answers_key, read_answers

# The examples of a question; none for zero-shot.
Examples = Callable[[Row], Sequence[Row]]


@dataclass(frozen=True, kw_only=True)
class Answered:
    """The answers of one way to rows, in their order; references: the right ones, as the model is to write them."""

    rows: tuple[AnsweredRow, ...]
    references: tuple[str, ...]
    key: str
    shared_tokens: int | None = None  # first tokens that all prompts share, which a cached prefix spares


class Rival(Protocol):
    """Something that answers prompts. name: in results. kind: base, model, tuned or endpoint."""

    name: str
    kind: str

    def answer(self, rows: Sequence[Row], examples: Examples, system: SystemPrompt = OWN) -> Answered:
        """The answers to rows after examples, from the cache where they are there."""

    def room(self, rows: Sequence[Row], examples: Examples, k: int, system: SystemPrompt = OWN) -> str | None:
        """Why k examples do not fit before some row; None if they fit before all."""

    def speed(self, rows: Sequence[Row], examples: Examples, system: SystemPrompt = OWN) -> dict[str, Any]:
        """Seconds a call, alone and side by side; kept, so that a second call measures nothing."""


class Local:
    """A model on this machine. load: the module, called when something must be generated; digest: of its weights.

    positions: of the model. answers_of: run folders with their ways and steps, whose own answers to the same prompts
    are used. between: called now and then while it answers; it may raise.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        *,
        tokenizer: Tokenizer,
        config: RunConfig,
        digest: str,
        cache: AnswerCache,
        load: Callable[[], Decoder],
        positions: int,
        answers_of: Sequence[tuple[Path, str, int | None]] = (),
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.kind = name, kind
        self._tokenizer, self._eval, self.digest, self._cache = tokenizer, config.eval, digest, cache
        self._load, self._positions, self._answers_of, self._between = load, positions, answers_of, between
        self._vectors: dict[str, np.ndarray] = {}

    def answer(self, rows: Sequence[Row], examples: Examples, system: SystemPrompt = OWN) -> Answered:
        """The answers to rows after examples, from the cache or the run's own files where they are there."""
        pairs = [prompt_tokens(self._tokenizer, row, examples(row), system) for row in rows]
        prompts = [prompt for prompt, _ in pairs]
        key = digest_of(self.digest, prompts, self._eval.max_new_tokens)
        kept = self._kept(key, prompts)
        if len(kept) < len(prompts):
            kept = answer_prompts(
                self._load(),
                self._tokenizer,
                prompts,
                max_new_tokens=self._eval.max_new_tokens,
                slots=self._eval.batch_size,
                kept=kept,
                save=lambda done: self._cache.write(key, done),
                between=self._between,
            )
        return Answered(
            rows=tuple(kept), references=tuple(right for _, right in pairs), key=key, shared_tokens=shared(prompts)
        )

    def room(self, rows: Sequence[Row], examples: Examples, k: int, system: SystemPrompt = OWN) -> str | None:
        """Why k examples do not fit into the model's positions beside the longest answer; None if they do."""
        prompts = [prompt_tokens(self._tokenizer, row, examples(row), system)[0] for row in rows]
        return check_room(prompts, [row.name for row in rows], self._positions - self._eval.max_new_tokens, k)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of texts, with those that the tokenizer adds to every text."""
        return [self._tokenizer.encode(text, add_special_tokens=True) for text in texts]

    def log_probabilities(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """The log-probabilities of every next token of rows of token ids; see `states.log_probabilities`."""
        return log_probabilities(self._load(), rows)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """The vector of each text, [N, D] float32, as `mean_states` gives it; they are kept."""
        name = f"vectors-{digest_of(self.digest)}"
        known = self._vectors or self._cache.vectors(name)
        keys = [digest_of(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in known}
        if missing:
            vectors = mean_states(self._load(), self._tokenizer, list(missing.values()))
            known |= dict(zip(missing, vectors, strict=True))
            self._cache.keep_vectors(name, known)
        self._vectors = known
        return np.stack([known[key] for key in keys])

    def speed(self, rows: Sequence[Row], examples: Examples, system: SystemPrompt = OWN) -> dict[str, Any]:
        """Seconds and memory of calls on the first rows; see `call_seconds`, `memory` and `peak.peak_bytes`."""
        prompts = [prompt_tokens(self._tokenizer, row, examples(row), system)[0] for row in rows[:MEASURED]]
        slots = min(self._eval.batch_size, len(prompts))
        name = f"calls-{digest_of(self.digest, prompts, self._eval.max_new_tokens, slots)}"
        if kept := self._cache.value(name):
            return kept
        module, longest = self._load(), self._eval.max_new_tokens

        def answer(batch: Sequence[Sequence[int]], at_once: int, on_token: OnToken | None) -> None:
            answer_prompts(module, self._tokenizer, batch, max_new_tokens=longest, slots=at_once, on_token=on_token)

        measured = call_seconds(answer, prompts, slots, self._between)
        measured |= memory(module, slots, max(map(len, prompts)) + longest)
        peak = peak_bytes(lambda: answer(prompts, slots, None), jax.local_devices())
        measured |= {} if peak is None else {"memory_bytes": peak, "memory_by": "devices"}
        self._cache.keep_value(name, measured)
        return measured

    def _kept(self, key: str, prompts: Sequence[Sequence[int]]) -> list[AnsweredRow]:
        kept = self._cache.kept(key)
        for folder, way, step in self._answers_of:
            if len(kept) == len(prompts):
                break
            wanted = answers_key(prompts, self._eval.max_new_tokens, step)
            rows = [one for one in read_answers(folder / ANSWERS) if one["way"] == way and one["key"] == wanted]
            fields = AnsweredRow.__dataclass_fields__
            kept = [AnsweredRow(**{name: row[name] for name in fields}) for row in rows] or kept
        return kept[: len(prompts)]
