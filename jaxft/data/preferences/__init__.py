"""Rows of preferences, in the forms that are common: pairs of a chosen and a rejected answer, and labelled answers."""

from jaxft.data.preferences.labelled import Labelled, Reserved, prepare_labelled
from jaxft.data.preferences.pairs import Pair, join_pairs, prepare_pairs, read_pairs

__all__ = ["Labelled", "Pair", "Reserved", "join_pairs", "prepare_labelled", "prepare_pairs", "read_pairs"]
