"""Virtual tokens: ids outside the vocabulary, at which prompt and prefix tuning insert learnt vectors.

They have positions, segments and cache slots like other tokens, so packing, meshes, windows and generation need no
special case. Each document begins with its own virtual tokens, and no document sees those of another.
"""

FIRST = 2**30  # beyond any vocabulary


def virtual_ids(count: int) -> tuple[int, ...]:
    """The ids at the start of every document, for a model with `count` virtual tokens."""
    return tuple(range(FIRST, FIRST + count))
