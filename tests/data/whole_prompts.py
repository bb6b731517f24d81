"""Tokens and mask of conversations by the definition: every prompt is encoded whole. An oracle for `encode_all`."""

from collections import Counter

from jaxft.config import DataConfig
from jaxft.data.chat.encode import encode_all
from jaxft.data.chat.turns import layouts


def sequences_of(conversation, tokenizer, config):
    """(ids, mask) of every sequence of a chat, up to its last trained token."""
    for layout in layouts(conversation, tokenizer, config, Counter()):
        ids, last = tokenizer.encode(layout.text), 0
        mask = [0] * len(ids)
        for turn in layout.turns:
            prompt = tokenizer.encode(turn.prompt)
            assert ids[: len(prompt)] == prompt
            last = next(i for i in range(len(prompt), len(ids)) if ids[i] in tokenizer.stop_ids)
            mask[len(prompt) : last + 1] = [1] * (last + 1 - len(prompt))
        yield ids[: last + 1], mask[: last + 1]


def assert_same(conversations, tokenizer, config=None):
    config = config or DataConfig()
    encoded = [(one.tokens.tolist(), one.mask.tolist()) for one in encode_all(conversations, tokenizer, config)]
    assert encoded == [one for chat in conversations for one in sequences_of(chat, tokenizer, config)]
