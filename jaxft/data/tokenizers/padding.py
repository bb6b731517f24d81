"""A token for padding that never ends an answer, for readers that look for the end of a document by its token."""

import copy

from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError


def separate_pad_id(tokenizer: Tokenizer) -> int:
    """The id of a special token that is no stop token: its pad token if it has such a one, else another.

    transformers reads a reward model's score at the last token that is not its pad token, so a pad token that is also
    the end token would have it read one token too early. Raises DataError if all special tokens end answers.
    """
    backend = tokenizer.backend
    special = [i for i, token in sorted(backend.added_tokens_decoder.items()) if token.special]
    first = [backend.pad_token_id, *(i for i in special if "pad" in tokenizer.token(i).lower()), backend.unk_token_id]
    for token_id in (*first, *reversed(special)):
        if token_id is None or token_id in tokenizer.stop_ids or token_id == tokenizer.bos_id:
            continue
        if tokenizer.has_row(token_id):
            return int(token_id)
    ends = ", ".join(repr(tokenizer.token(i)) for i in sorted(tokenizer.stop_ids)) or "none"
    raise DataError(
        f"the tokenizer {tokenizer.name or 'in use'} has no special token that could pad: all of them end an answer "
        f"or begin a text (ends: {ends}), and transformers reads a reward model's score before the padding. Add a pad "
        "token to its tokenizer.json and set pad_token in its tokenizer_config.json."
    )


def with_separate_pad(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the token of `separate_pad_id` as its pad token."""
    backend = copy.deepcopy(tokenizer.backend)
    backend.pad_token = tokenizer.token(separate_pad_id(tokenizer))
    return Tokenizer(backend, name=tokenizer.name, extra_stop_ids=tokenizer.stop_ids, table_rows=tokenizer.table_rows)
