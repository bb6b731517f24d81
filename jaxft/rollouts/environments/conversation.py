"""An answer of several turns while it is sampled: what the model has to continue, and what it has said."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxft.data.prompts import Prompt
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.generation.settings import FinishReason, Generated
from jaxft.rollouts.environments.episode import Episode, Part
from jaxft.rollouts.environments.protocol import Message
from jaxft.rollouts.environments.template import ANSWER, TurnTemplate
from jaxft.rollouts.rollout import Rollout


@dataclass(kw_only=True, eq=False)
class Conversation:
    """One answer under way. Tokens only ever grow: nothing that was sampled is tokenised again.

    prompt: with the messages that the environment gave. limit: most tokens after it. history: all messages as the
    template renders them. messages: those after the prompt. tokens, sampled, logprobs: after the prompt, see `Rollout`.
    finish_reason: None while it goes on.
    """

    prompt: Prompt
    limit: int
    tokenizer: Tokenizer
    template: TurnTemplate
    history: list[Message]
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    turns: int = 0
    cut: bool = False
    lost: bool = False
    finish_reason: FinishReason | None = None

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return self.limit - len(self.tokens)

    def add_turn(self, turn: Generated) -> str:
        """Adds what the model sampled; returns its text without stop tokens."""
        self._extend(turn.tokens, turn.logprobs, sampled=True)
        self.turns += 1
        text = self.tokenizer.decode(turn.tokens)
        self.messages.append({"role": "assistant", "content": text})
        if turn.finish_reason == "length":
            self.finish_reason = "length"
        return text

    def add_reply(self, reply: Sequence[Message] | None, *, most_turns: int) -> None:
        """Adds what the environment said to the last turn, if the conversation goes on; None: the instance is lost.

        A reply that leaves no room for a token of the model is not added, and ends the conversation as cut off.
        """
        if reply is None:
            self.lost = True
        if self.finish_reason is not None:
            return
        if not reply or self.turns >= most_turns:
            self.cut = bool(reply)
            self.finish_reason = "stop"
            return
        known = self.template.known(reply)
        self.history.append(ANSWER)
        tokens = self.template.continuation(self.history, known, self.tokens[-1], rendering_of(self.prompt))
        if len(tokens) >= self.left:
            self.finish_reason = "length"
            return
        self._extend(tokens, [0.0] * len(tokens), sampled=False)
        self.history += known
        self.messages += reply

    def rollout(self, number: int, group_size: int, reward: float | None) -> Rollout:
        """The whole answer; its text is that of the last turn. reward: what the environment gave it."""
        episode = Episode(
            messages=tuple(self.messages),
            parts=tuple(self.parts),
            turns=self.turns,
            cut=self.cut,
            tool_calls=sum(message["role"] == "tool" for message in self.messages),
            lost=self.lost,
            reward=reward,
        )
        return Rollout(
            prompt=self.prompt,
            number=number,
            group=number // group_size,
            tokens=np.array(self.tokens, np.int32),
            sampled=np.array(self.sampled, bool),
            logprobs=np.array(self.logprobs, np.float32),
            finish_reason=self.finish_reason or "stop",
            text=next(one["content"] for one in reversed(self.messages) if one["role"] == "assistant"),
            episode=episode,
        )

    def _extend(self, tokens: Sequence[int], logprobs: Sequence[float], *, sampled: bool) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.sampled += [sampled] * len(tokens)
        self.parts.append(Part(text=self.tokenizer.decode(tokens, skip_special_tokens=False), sampled=sampled))


def rendering_of(prompt: Prompt) -> dict[str, Any]:
    """What a chat template reads beside the messages."""
    return {**prompt.template_kwargs, "tools": prompt.tools}
