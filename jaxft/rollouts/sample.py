"""Sampling groups of answers to prompts, with the weights that are trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxft.adapters.critic import without_critic
from jaxft.data.prompts import Prompt
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError
from jaxft.generation.buckets import power_of_two
from jaxft.generation.layout import for_decoding
from jaxft.generation.settings import Generated, Sampling
from jaxft.generation.thoughts import parts_of, sampled_text
from jaxft.generation.tokens import generate_tokens
from jaxft.nn.decoder import Decoder
from jaxft.rollouts.environments.conversation import Conversation, rendering_of
from jaxft.rollouts.environments.environments import Environments
from jaxft.rollouts.environments.protocol import Message
from jaxft.rollouts.environments.template import TurnTemplate
from jaxft.rollouts.rollout import Rollout


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How answers are sampled. All calls have one compiled shape.

    group: answers to each prompt. length: most tokens of a prompt with its answer. slots: most answers that are decoded
    at the same time. environments: what replies to the model, up to max_turns of it; None: an answer is one turn.
    prompt_length: most tokens of a prompt that an environment gives, if that is less than fits.
    """

    tokenizer: Tokenizer
    group: int
    max_completion_length: int
    length: int
    slots: int
    environments: Environments | None = None
    max_turns: int = 1
    prompt_length: int | None = None

    def sample(
        self, model: Decoder, prompts: Sequence[Prompt], *, temperature: float, seed: int, first_group: int = 0
    ) -> list[Rollout]:
        """Answers to every prompt, group after group.

        temperature: 0 is greedy. seed: of all draws, which also depend on the number of the answer and the position of
        the token. first_group: the number of the first group; answers are numbered in the order of groups, so that
        several calls can draw what one would. Raises DataError, naming the row, for a prompt of an environment that is
        too long or that the template refuses, and EnvironmentFailure.
        """
        sampling = Sampling(max_new_tokens=self.max_completion_length, temperature=temperature, seed=seed)
        if self.environments is not None:
            return self._with_environments(model, prompts, sampling, self.environments, first_group)
        rows = [prompt for prompt in prompts for _ in range(self.group)]
        first = first_group * self.group
        done = generate_tokens(
            without_critic(model),
            # Virtual tokens, which prompts begin with, are put there by the generation.
            [prompt.tokens[model.virtual_tokens :].tolist() for prompt in prompts],
            sampling=sampling,
            stop_ids=self.tokenizer.stop_ids,
            slots=self.slots,
            answers=self.group,
            length=self.length,
            tempered_logprobs=True,
            streams=range(first, first + len(rows)),
        )
        return [
            self._rollout(prompt, first + number, one)
            for number, (prompt, one) in enumerate(zip(rows, done, strict=True))
        ]

    def _rollout(self, prompt: Prompt, number: int, one: Generated) -> Rollout:
        tokens = np.array(one.tokens, np.int32)
        is_chat = not isinstance(prompt.messages, str)
        parts = parts_of(self.tokenizer, prompt.tokens.tolist(), one.tokens) if is_chat else None
        return Rollout(
            prompt=prompt,
            number=number,
            group=number // self.group,
            tokens=tokens,
            sampled=np.ones(len(tokens), bool),
            logprobs=np.array(one.logprobs, np.float32),
            finish_reason=one.finish_reason,
            text=sampled_text(self.tokenizer, one.tokens, parts),
            parts=parts,
        )

    def _with_environments(
        self,
        model: Decoder,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        environments: Environments,
        first_group: int,
    ) -> list[Rollout]:
        """Answers of several turns. In each turn all conversations that go on are one call of generation.

        What earlier turns left in the KV cache is computed again with them, so that all calls have the same shapes.
        """
        model = for_decoding(model)
        rows = [prompt for prompt in prompts for _ in range(self.group)]
        given = environments.reset([row_of(prompt) for prompt in rows], [prompt.where for prompt in rows])
        template = TurnTemplate(self.tokenizer)
        talks = [self._start(*pair, template, model.virtual_tokens) for pair in zip(rows, given, strict=True)]
        first = first_group * self.group
        slots = min(self.slots, power_of_two(len(talks)))
        while going := [i for i, talk in enumerate(talks) if talk.finish_reason is None]:
            turns = self._turns(model, {i: talks[i] for i in going}, sampling, slots, first)
            texts = {i: talks[i].add_turn(turn) for i, turn in turns.items()}
            for i, reply in environments.step(texts).items():
                try:
                    talks[i].add_reply(reply, most_turns=self.max_turns)
                except DataError as error:
                    raise DataError(f"{rows[i].where}: {error}") from error
        rewards = environments.rewards(range(len(talks)))
        rollouts = []
        for i, talk in enumerate(talks):
            reward, lost = rewards[i]
            talk.lost |= lost
            rollouts.append(talk.rollout(first + i, self.group, reward))
        return rollouts

    def _start(self, prompt: Prompt, messages: Sequence[Message], template: TurnTemplate, virtual: int) -> Conversation:
        known = template.known(messages)
        if known != list(prompt.messages):
            try:
                ids = template.prompt(known, **rendering_of(prompt))
            except DataError as error:
                raise DataError(f"{prompt.where}: {error}") from error
            tokens = np.array([*prompt.tokens[:virtual], *ids], np.int32)
            mask = np.zeros(len(tokens), np.uint8)
            prompt = replace(prompt, tokens=tokens, mask=mask, messages=tuple(messages))
        most = self.prompt_length or self.length - self.max_completion_length
        if len(prompt) > most:
            raise DataError(
                f"{prompt.where}: the prompt that the environment gives has {len(prompt)} tokens, and answers of "
                f"rollout.max_completion_length={self.max_completion_length} leave room for {most}. Raise "
                f"data.max_length by {len(prompt) - most} or more, or make the prompt shorter."
            )
        return Conversation(
            prompt=prompt,
            limit=self.max_completion_length,
            tokenizer=self.tokenizer,
            template=template,
            history=known,
        )

    def _turns(
        self, model: Decoder, talks: dict[int, Conversation], sampling: Sampling, slots: int, first: int
    ) -> dict[int, Generated]:
        """The next turn of some conversations, by their numbers. first: the number of the first answer."""
        virtual = model.virtual_tokens
        prompts = [[*talk.prompt.tokens[virtual:].tolist(), *talk.tokens] for talk in talks.values()]
        groups = [prompts[start : start + self.group] for start in range(0, len(prompts), self.group)]
        # The prompt of a group is computed once if its instances gave the same one, as in a first turn of most.
        alike = not any(talk.turns for talk in talks.values()) and all(
            own == group[0] for group in groups for own in group
        )
        done = generate_tokens(
            model,
            [group[0] for group in groups] if alike else prompts,
            sampling=[replace(sampling, max_new_tokens=talk.left) for talk in talks.values()],
            stop_ids=self.tokenizer.stop_ids,
            slots=slots,
            answers=self.group if alike else 1,
            length=self.length,
            tempered_logprobs=True,
            streams=[first + i for i in talks],
            keep_slots=True,
        )
        return dict(zip(talks, done, strict=True))


def row_of(prompt: Prompt) -> dict[str, object]:
    """The row as environments see it."""
    messages = prompt.messages if isinstance(prompt.messages, str) else list(prompt.messages)
    return {"index": prompt.row, **prompt.columns, "prompt": messages}


def seed_of(seed: int, rollout: int, draw: int = 0) -> int:
    """The seed of the draws of one rollout: another one for each run, rollout, and replacement of its prompts."""
    return int(np.random.SeedSequence([seed, rollout, draw]).generate_state(1)[0])
