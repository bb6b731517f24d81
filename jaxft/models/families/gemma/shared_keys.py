"""Last layers without keys and values: the names that they have in files all the same, and checks of their number."""

import re
from collections.abc import Sequence

from jaxft.errors import ModelError
from jaxft.models.family import layer_number

_KEYS = re.compile(r"model\.layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")


def is_unused_key(name: str, first: int) -> bool:
    """Whether a tensor of the files is for keys or values of a layer without them. first: the first such layer."""
    number = layer_number(name)
    return number is not None and number >= first and _KEYS.match(name) is not None


def check_shared(types: Sequence[str], shared: int) -> None:
    """Raises ModelError unless each of the last `shared` layers has a layer of its type before them."""
    if missing := sorted(set(types[len(types) - shared :]) - set(types[: len(types) - shared])):
        raise ModelError(
            f"num_kv_shared_layers={shared}: no layer of type {missing[0]} is before these, whose keys they could use"
        )
