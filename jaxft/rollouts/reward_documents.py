"""What a reward model reads of a sampled answer: the tokens as they were sampled, or its own rendering of the text."""

import numpy as np

from jaxft.data.chat.encode import bos_of, encode
from jaxft.data.chat.turns import render
from jaxft.data.formats import Conversation
from jaxft.data.prompts import Prompt
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ConfigError
from jaxft.rollouts.rollout import Rollout


class Reader:
    """The documents of token ids that a reward model reads.

    With the tokenizer of the trained model they are the prompt and the answer as they were sampled. A reward model with
    other tokens, or prompts of messages and another chat template, reads its own rendering of the prompt, the text of
    the answer, and its end token if the answer ended.
    """

    def __init__(self, sampled: Tokenizer, own: Tokenizer, *, virtual_tokens: int = 0, embeds_all: bool = True) -> None:
        """sampled: of the trained model, whose prompts begin with virtual_tokens. own: of the reward model.
        embeds_all: whether the reward model embeds every id that the trained one can sample.
        """
        self._own, self._virtual = own, virtual_tokens
        self._same_tokens = embeds_all and sampled.backend.get_vocab() == own.backend.get_vocab()
        self._same_template = sampled.chat_template == own.chat_template

    @property
    def reads_chats_as_sampled(self) -> bool:
        """Whether the tokens of every prompt of messages, and of what follows it, are read as they were sampled."""
        return self._same_tokens and self._same_template

    def as_sampled(self, prompt: Prompt) -> bool:
        """Whether the tokens of a prompt and its answer are read as they were sampled."""
        return self.reads_chats_as_sampled or (self._same_tokens and isinstance(prompt.messages, str))

    def document(self, one: Rollout) -> np.ndarray:
        """The token ids of an answer after its prompt, int32."""
        if self.as_sampled(one.prompt):
            return np.concatenate([one.prompt.tokens[self._virtual :], one.tokens]).astype(np.int32)
        ids = [*self._prompt(one.prompt), *self._own.encode(one.text)]
        self._own.check_rows(ids, f"an answer to {one.prompt.where}, as rewards.model reads it")
        end = self._end_of(one.prompt) if one.finish_reason == "stop" else None
        return np.array(ids if end is None else [*ids, end], np.int32)

    def check(self, prompt: Prompt) -> None:
        """Raises ConfigError if the reward model's tokenizer cannot render a prompt of messages."""
        if not self.as_sampled(prompt) and not isinstance(prompt.messages, str) and self._own.chat_template is None:
            raise ConfigError(
                f"{prompt.where} is a prompt of messages, but the tokenizer of rewards.model, {self._own.name}, has "
                "no chat template to render it with. Put a chat_template.jinja into its folder: the one that the "
                "reward model was trained with."
            )

    def _prompt(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt.messages, str):
            return [*bos_of(self._own), *self._own.encode(prompt.messages)]
        chat = Conversation(
            row=prompt.row,
            where=prompt.where,
            format="prompt",
            messages=prompt.messages,
            tools=prompt.tools,
            template_kwargs=dict(prompt.template_kwargs),
        )
        return self._own.encode(render(chat, self._own, len(prompt.messages), add_generation_prompt=True))

    def _end_of(self, prompt: Prompt) -> int | None:
        if isinstance(prompt.messages, str):
            return self._own.eos_id
        messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        (example,) = encode(Conversation(row=0, where="a probe", format="messages", messages=messages), self._own)
        return int(example.tokens[-1])
