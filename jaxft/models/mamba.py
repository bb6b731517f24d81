"""What families with Mamba-2 layers share: the table of their tensors, the bounds of the time step in config.json."""

from collections.abc import Iterator, Mapping
from typing import Any

from jaxft.models.tensor_map import DEPTHWISE, TensorMap, linear
from jaxft.nn.recurrent.mamba import Mamba2Shape

NO_BOUNDS = [0.0, float("inf")]  # time_step_limit


def mamba_tensors(shape: Mamba2Shape, module: str) -> Iterator[TensorMap]:
    """The table's lines for a layer with Mamba-2. module: its name in files."""
    path = "layers/*/mamba"
    for name in ("in_proj", "out_proj"):
        yield from linear(f"{module}.{name}", f"{path}/{name}", bias=shape.use_bias)
    yield TensorMap(f"{module}.conv1d.weight", f"{path}/conv1d/taps", DEPTHWISE)
    if shape.use_conv_bias:
        yield TensorMap(f"{module}.conv1d.bias", f"{path}/conv1d/bias")
    yield TensorMap(f"{module}.norm.weight", f"{path}/norm/scale")
    yield from (TensorMap(f"{module}.{name}", f"{path}/{name}") for name in ("A_log", "D", "dt_bias"))


def with_bounds(hf: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the bounds in `time_step_limit` as numbers.

    transformers writes infinity, which JSON has not, as {"__float__": "Infinity"}.
    """
    limit = hf.get("time_step_limit")
    return {**hf} if not isinstance(limit, list | tuple) else {**hf, "time_step_limit": [_bound(end) for end in limit]}


def _bound(value: Any) -> Any:
    return float("inf") if value in ({"__float__": "Infinity"}, "Infinity") else value
