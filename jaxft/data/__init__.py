"""From rows of text to batches: sources, formats, chat, examination, packing, mixtures, loader."""

from jaxft.data.batch import Batch, Example
from jaxft.data.examine import Examination
from jaxft.data.formats import Conversation
from jaxft.data.prepare import Prepared, TrainSet, prepare
from jaxft.data.show import print_examination, render_rows
from jaxft.data.tokenizers.load import load_tokenizer, tokenizer_of
from jaxft.data.tokenizers.tokenizer import Tokenizer

__all__ = [
    "Batch",
    "Conversation",
    "Examination",
    "Example",
    "Prepared",
    "Tokenizer",
    "TrainSet",
    "load_tokenizer",
    "prepare",
    "print_examination",
    "render_rows",
    "tokenizer_of",
]
