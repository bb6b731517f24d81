"""How a chat template continues a conversation of which the model's turns are known as tokens only."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.chat.template_probes import CONTENT, QUESTION, VALUE
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ConfigError, DataError
from jaxft.rollouts.environments.protocol import Message

# It takes the place of every turn of the model in renderings: the sampled text is never rendered.
ANSWER = {"role": "assistant", "content": CONTENT}
THOUGHT = "An unmistakable thought"
MEND = "Set data.chat_template to a template that writes every earlier answer as it writes the last one."


class TurnTemplate:
    """The token ids that the chat template of a tokenizer puts around the turns of a model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def check(self) -> None:
        """Renders a small conversation in two lengths.

        Raises ConfigError if there is no template, or if it writes the earlier text differently in the longer one: then
        the model would be trained on conversations that never occur when the model is used.
        """
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            raise ConfigError(
                f"rollout.environment needs a chat template, and the tokenizer of {tokenizer.name!r} has none. Set "
                "data.chat_template to the file of the template that the model was trained with."
            )
        thoughtful = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n{CONTENT}"}
        following = {"role": "user", "content": "Go on"}
        for answer in (ANSWER, thoughtful):
            prompt = tokenizer.render([QUESTION], add_generation_prompt=True)
            before = tokenizer.render([QUESTION, answer])
            whole = tokenizer.render([QUESTION, answer, following], add_generation_prompt=True)
            kept = before[: before.rfind(CONTENT) + len(CONTENT)]
            shown = CONTENT in before and (answer is ANSWER or THOUGHT in before)
            if not (shown and kept.startswith(prompt) and whole.startswith(kept)):
                what = "an earlier answer" if answer is ANSWER else "an earlier answer that has thoughts"
                raise ConfigError(
                    f"rollout.environment cannot be used with the chat template of {tokenizer.name!r}: it writes "
                    f"{what} differently once more messages follow it, or differently from how the model gave it, so "
                    f"that the tokens of a conversation would change from turn to turn. {MEND}"
                )

    @functools.cached_property
    def knows_tools(self) -> bool:
        """Whether the template writes messages of the role `tool`."""
        try:
            text = self._tokenizer.render([QUESTION, ANSWER, {"role": "tool", "content": VALUE}])
        except DataError:
            return False
        return VALUE in text

    def known(self, messages: Sequence[Message]) -> list[Message]:
        """The messages; those of `tool` as messages of `user`, if the template does not know the role."""
        if self.knows_tools:
            return list(messages)
        return [{**one, "role": "user"} if one["role"] == "tool" else one for one in messages]

    def prompt(self, messages: Sequence[Message], **rendering: Any) -> list[int]:
        """The token ids of a prompt. rendering: tools and variables of the template."""
        ids = self._tokenizer.encode(self._tokenizer.render(messages, add_generation_prompt=True, **rendering))
        self._tokenizer.check_rows(ids, "a prompt of rollout.environment")
        return ids

    def continuation(
        self, history: Sequence[Message], messages: Sequence[Message], stop: int, rendering: Mapping[str, Any]
    ) -> list[int]:
        """The token ids between a turn of the model and its next one.

        history: all earlier messages, the model's turns as ANSWER, the last of which is followed by `messages`. stop:
        the last sampled token, which is not repeated if the template begins with it. Raises DataError if the template
        writes the history differently when messages follow it.
        """
        before = self._tokenizer.render(history, **rendering)
        whole = self._tokenizer.render([*history, *messages], add_generation_prompt=True, **rendering)
        end = before.rfind(CONTENT) + len(CONTENT)
        if CONTENT not in before or not whole.startswith(before[:end]):
            roles = ", ".join(one["role"] for one in messages)
            raise DataError(
                f"the chat template writes the earlier conversation differently once messages ({roles}) follow it. "
                f"{MEND}"
            )
        first, ids = self._tokenizer.encode(before[:end]), self._tokenizer.encode(whole)
        # A token that would hold both the end of the answer and what follows cannot be kept: the answer is sampled.
        ids = ids[len(first) :] if ids[: len(first)] == first else self._tokenizer.encode(whole[end:])
        self._tokenizer.check_rows(ids, "a reply of rollout.environment")
        return ids[1:] if ids[:1] == [stop] else ids
