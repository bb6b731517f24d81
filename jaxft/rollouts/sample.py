"""Sampling groups of answers to prompts, with the weights that are trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxft.data.prompts import Prompt
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.generation.settings import Generated, Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.nn.decoder import Decoder
from jaxft.rollouts.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How answers are sampled. All calls have one compiled shape.

    group: answers to each prompt. length: most tokens of a prompt with its answer. slots: most answers that are decoded
    at the same time.
    """

    tokenizer: Tokenizer
    group: int
    max_completion_length: int
    length: int
    slots: int

    def sample(
        self, model: Decoder, prompts: Sequence[Prompt], *, temperature: float, seed: int, first_group: int = 0
    ) -> list[Rollout]:
        """Answers to every prompt, group after group.

        temperature: 0 is greedy. seed: of all draws, which also depend on the number of the answer. first_group: the
        number of the first group; answers are numbered in the order of groups, so that several calls can draw what one
        would.
        """
        sampling = Sampling(max_new_tokens=self.max_completion_length, temperature=temperature, seed=seed)
        done = generate_tokens(
            model,
            # Virtual tokens, which prompts begin with, are put there by the generation.
            [prompt.tokens[model.virtual_tokens :].tolist() for prompt in prompts],
            sampling=sampling,
            stop_ids=self.tokenizer.stop_ids,
            slots=self.slots,
            answers=self.group,
            length=self.length,
            tempered_logprobs=True,
            first_stream=first_group * self.group,
        )
        rows = [prompt for prompt in prompts for _ in range(self.group)]
        first = first_group * self.group
        return [
            self._rollout(prompt, first + number, one)
            for number, (prompt, one) in enumerate(zip(rows, done, strict=True))
        ]

    def _rollout(self, prompt: Prompt, number: int, one: Generated) -> Rollout:
        tokens = np.array(one.tokens, np.int32)
        return Rollout(
            prompt=prompt,
            number=number,
            group=number // self.group,
            tokens=tokens,
            sampled=np.ones(len(tokens), bool),
            logprobs=np.array(one.logprobs, np.float32),
            finish_reason=one.finish_reason,
            text=self.tokenizer.decode(one.tokens),
        )


def seed_of(seed: int, rollout: int, draw: int = 0) -> int:
    """The seed of the draws of one rollout: another one for each run, rollout, and replacement of its prompts."""
    return int(np.random.SeedSequence([seed, rollout, draw]).generate_state(1)[0])
