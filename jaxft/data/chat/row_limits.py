"""Rows that are far too long, judged by their characters before a tokenizer spends memory on them."""

from jaxft.config import DataConfig
from jaxft.data.chat.turns import Layout
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError

# A tokenizer takes about 300 bytes of memory for each character, so that shorter texts cost little.
JUDGED = 1_000_000
MOST = 30_000_000
# A tokenizer may shorten a text before it looks for tokens, for example when it joins accents to letters.
SHORTENED = 4


def check_length(layout: Layout, tokenizer: Tokenizer, config: DataConfig) -> None:
    """Raises DataError for a text that has more tokens than a sequence in any case, if such rows are not cut.

    Rows that `data.truncation` cuts are tokenised first, and refused above MOST characters.
    """
    size, where = len(layout.text), layout.conversation.where
    if size <= JUDGED:
        return
    if config.truncation in ("refuse", "drop"):
        most = config.max_length * tokenizer.longest_token * SHORTENED
        if size > most:
            cuts = "'right' or 'left'" if layout.conversation.messages else "'right', 'left' or 'windows'"
            ways = f", or set data.truncation to {cuts}" if size <= MOST else ""
            raise DataError(
                f"{where} has {size:,} characters, more than data.max_length={config.max_length:,} tokens can hold. "
                f"Split the row into several, or remove it{ways}."
            )
    if size > MOST:
        raise DataError(
            f"{where} has {size:,} characters, and rows of at most {MOST:,} are tokenised, which takes 10 GB of "
            "memory. Split the row into several."
        )
