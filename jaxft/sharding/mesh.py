"""The mesh: named axes over the devices. One device is a mesh of 1; no other code depends on their number."""

# B batch
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.config import MeshConfig
from jaxft.errors import ConfigError
from jaxft.nn.partition import AXES
from jaxft.nn.storage import StorageDims, storage_dims_of
from jaxft.sharding.arrays import Tree, put_global
from jaxft.sharding.specs import Leaf, divisors, specs_of
from jaxft.trees import is_key, path_str

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class MeshPlan:
    """A device mesh and the shardings that follow from it."""

    mesh: Mesh

    @property
    def axes(self) -> dict[str, int]:
        """Axis name -> number of devices, in mesh order."""
        return dict(self.mesh.shape)

    @property
    def batch_shards(self) -> int:
        """Number of parts that the rows of a batch are split into."""
        return math.prod(self.axes.get(axis, 1) for axis in AXES["batch"])

    def describe(self) -> str:
        """One line for people: `8 cpu devices: data=1, fsdp=8`."""
        kind, count = self.mesh.devices.flat[0].device_kind, self.mesh.devices.size
        return f"{count} {kind} device{'s' * (count > 1)}: {_sizes(self.axes)}"

    def shardings(self, tree: Any, dims: Mapping[str, StorageDims]) -> Any:
        """A NamedSharding in the place of every array or ShapeDtypeStruct of a pytree.

        tree: parameters of a model, or a whole train state, whose optimizer moments are split like their parameters.
        dims: how stored parameters are split, `storage_dims_of(model)`. Raises ConfigError for a big array with a
        dimension that its axes do not divide, naming the sizes that would, and for a big array that would be whole on
        every device although axes split weights.
        """
        flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
        leaves = [Leaf(path_str(path), tuple(x.shape), not is_key(x)) for path, x in flat]
        specs = specs_of(leaves, dims, self.axes)
        return jax.tree_util.tree_unflatten(treedef, [NamedSharding(self.mesh, spec) for spec in specs])

    def shard(self, tree: Tree, dims: Mapping[str, StorageDims]) -> Tree:
        """The pytree on the mesh's devices, in the layout of `shardings`. Every process must pass the same arrays."""
        return jax.tree.map(put_global, tree, self.shardings(tree, dims))

    def shard_module(self, module: nnx.Module) -> None:
        """Moves the parameters of a module to the mesh's devices, in the layout that the module declares."""
        nnx.update(module, self.shard(nnx.state(module), storage_dims_of(module)))

    def batch_sharding(self) -> NamedSharding:
        """Rows over all batch axes, for arrays [B, ...]."""
        return NamedSharding(self.mesh, P(tuple(axis for axis in AXES["batch"] if axis in self.axes)))

    def bind(self, step: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        """`step` for `jax.jit`, traced under this mesh, so that layers with explicit collectives can read it."""

        @functools.wraps(step)
        def traced(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return step(*args, **kwargs)

        return traced

    def check_batch(self, rows: int, name: str = "train.batch_size / train.accumulation_steps") -> None:
        """Raises ConfigError if `rows`, named `name` in messages, is not divisible by the devices that share rows."""
        if rows % self.batch_shards:
            below = rows - rows % self.batch_shards
            near = [str(n) for n in (below, below + self.batch_shards) if n]
            raise ConfigError(
                f"{name} = {rows} rows are not divisible by {self.batch_shards} devices ({_sizes(self.axes)}), each of "
                f"which takes as many. Use {' or '.join(near)} rows."
            )

    def check_sizes(self, *, heads: int, kv_heads: int, max_length: int) -> None:
        """Raises ConfigError if the tensor axis does not divide heads, or context and tensor axes positions."""
        tensor, context = self.axes.get("tensor", 1), self.axes.get("context", 1)
        if heads % tensor or (kv_heads % tensor and tensor % kv_heads):
            fits = divisors(heads, lambda d: kv_heads % d == 0 or d % kv_heads == 0)
            raise ConfigError(
                f"mesh.tensor={tensor} does not divide {heads} query heads, or neither divides nor is divided by "
                f"{kv_heads} key-value heads. Set it to one of {', '.join(map(str, fits))}."
            )
        if max_length % (context * tensor):
            raise ConfigError(
                f"data.max_length={max_length} is not divisible by mesh.context={context} times mesh.tensor={tensor}, "
                f"which split positions. Use {-(-max_length // (context * tensor)) * context * tensor}."
            )


def make_mesh_plan(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> MeshPlan:
    """The mesh of a config over `devices` (default: all of every process).

    The config's fields are the axes, in order; the axis that communicates most is last. A size of -1 takes what
    remains. Neighbours on the last axes are neighbours in the torus, and the slice axis follows the slices. Raises
    ConfigError if the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    axes = fill_axes(axis_sizes(config), len(devices))
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    if slices > 1 and axes.get("slice") != slices:
        raise ConfigError(
            f"these devices are {slices} slices, joined by the data-centre network: set mesh.slice={slices}, so that "
            "only gradients cross it"
        )
    options = {"allow_split_physical_axes": True}  # otherwise data=2, fsdp=8 on a 4x4 torus is refused
    if slices > 1:
        inside = tuple(1 if axis == "slice" else size for axis, size in axes.items())
        across = tuple(size if axis == "slice" else 1 for axis, size in axes.items())
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, devices, **options)
    else:
        grid = mesh_utils.create_device_mesh(tuple(axes.values()), devices, **options)
    # jax.make_mesh would give Explicit axes, under which an embedding lookup needs an out_sharding.
    return MeshPlan(mesh=Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes)))


def auto_mesh(devices: int, *, rows: int, heads: int, kv_heads: int, max_length: int, slices: int = 1) -> MeshConfig:
    """Axis sizes for a run: as many devices as rows allow on fsdp, the remaining ones on tensor as far as heads allow,
    the rest on context.

    rows: of a micro-batch over all devices. Raises ConfigError if no such sizes use all devices.
    """
    each = devices // slices
    fsdp = max(n for n in divisors(each) if rows % (n * slices) == 0) if rows % slices == 0 else 0
    if fsdp:
        rest = each // fsdp
        tensor = max(n for n in divisors(rest) if heads % n == 0 and kv_heads % n == 0 and max_length % n == 0)
        context = rest // tensor
        if max_length % (context * tensor) == 0:
            return MeshConfig(slice=slices, fsdp=fsdp, tensor=tensor, context=context)
    raise ConfigError(
        f"mesh.auto cannot use all {devices} devices in {slices} slices: no mesh divides {rows} rows of {max_length} "
        f"positions and {kv_heads} key-value heads. Make the batch a multiple of {slices}, or set the axes yourself."
    )


def axis_sizes(config: MeshConfig) -> dict[str, int]:
    """The axes of a config with their sizes, in order."""
    return {name: size for name, size in dataclasses.asdict(config).items() if not isinstance(size, bool)}


def fill_axes(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The same with -1 replaced by what remains. Raises ConfigError if they do not multiply to the devices."""
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(f"mesh.{axis}={size} must be a positive number of devices, or -1 for the rest")
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(f"only one mesh axis may be -1 (the devices that remain), not {' and '.join(rest)}")
    given = math.prod(size for size in sizes.values() if size != -1)
    if devices % given or (not rest and given != devices):
        named = {axis: size for axis, size in sizes.items() if size > 1} or sizes
        fixed = ", ".join(f"mesh.{axis}={size}" for axis, size in named.items() if size != -1)
        raise ConfigError(
            f"{fixed} make {given} devices{' for the given axes' if rest else ''}, which "
            f"{'does not divide' if rest else 'are not'} the {devices} of this run. Axis sizes must multiply to "
            f"{devices}: give each one of {', '.join(map(str, divisors(devices)))}, or one of them -1 for the rest."
        )
    return {axis: devices // given if size == -1 else size for axis, size in sizes.items()}


def _sizes(axes: Mapping[str, int]) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in axes.items() if size > 1) or "no axis is split"
