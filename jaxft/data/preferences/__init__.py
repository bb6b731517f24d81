"""Rows of preferences: a prompt with a chosen and a rejected answer, in the forms that are common."""

from jaxft.data.preferences.pairs import Pair, join_pairs, prepare_pairs, read_pairs

__all__ = ["Pair", "join_pairs", "prepare_pairs", "read_pairs"]
