"""Rows of a data set, by index: from files, folders, the Hugging Face hub and TensorFlow Datasets."""

from jaxft.data.sources.json_rows import JsonlRows
from jaxft.data.sources.listing import is_here
from jaxft.data.sources.opening import held_out_rows, open_rows, train_and_eval
from jaxft.data.sources.rows import Listed, Rows, Subset
from jaxft.data.sources.tables import TableRows

__all__ = [
    "JsonlRows",
    "Listed",
    "Rows",
    "Subset",
    "TableRows",
    "held_out_rows",
    "is_here",
    "open_rows",
    "train_and_eval",
]
