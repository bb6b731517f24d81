"""One complete step of a run on disk: its content, and how all of it or only the weights for evaluation are restored.

The checkpoint describes itself: every path with its shape and dtype, and the places of averages of the weights. So a
model can be exported without the optimizer that trained it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from optax.contrib import ScheduleFreeState, schedule_free_eval_params

from jaxft.checkpoint import manifest
from jaxft.checkpoint.plain_path import PlainFolder
from jaxft.checkpoint.steps.bucket import is_bucket
from jaxft.checkpoint.steps.layout import abstract_arrays, as_state, differences, layout
from jaxft.checkpoint.steps.reader import reader
from jaxft.errors import CheckpointError, listed
from jaxft.optim.averages import AverageState
from jaxft.trees import path_str

AVERAGE, SCHEDULE_FREE = "average", "schedule_free"
SHOWN = 12  # differences listed in one error


def find_averages(state: Any, path: str = "") -> dict[str, str]:
    """Kind -> path of every average of weights in a train state, outermost first, as a checkpoint records them.

    The path of an `average` (optim.averages.with_average) is that of the averaged weights, of `schedule_free` that of
    its state.
    """
    kinds = (AverageState, ScheduleFreeState)
    nodes, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda node: isinstance(node, kinds))
    out: dict[str, str] = {}
    for key_path, node in nodes:
        at = "/".join(part for part in (path, path_str(key_path)) if part)
        if isinstance(node, AverageState):
            out |= {AVERAGE: f"{at}/average"} | find_averages(node.inner, f"{at}/inner")
        elif isinstance(node, ScheduleFreeState):
            out[SCHEDULE_FREE] = at
    return out


class SavedStep:
    """A complete step, whose files have been verified.

    folder: of the step, on this machine or (as an etils.epath.Path) in a bucket. meta: the data saved beside the
    arrays: `layout`, `averages`, `metrics` and `extra`.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self.folder, self.step = folder, int(folder.name)
        self._plain = None if is_bucket(folder) else PlainFolder(folder)
        self.extra: dict[str, Any] = meta["extra"]
        self._layout: Mapping[str, list[Any]] = meta["layout"]
        self._averages: Mapping[str, str] | None = meta.get("averages")

    def check_fits(self, abstract_state: Any, *, parts: tuple[str, ...] = ("",)) -> None:
        """Raises CheckpointError, listing paths, if tree, shapes or dtypes differ from what was saved.

        parts: paths in the saved state; what was saved elsewhere may be anything.
        """
        saved = {path: entry for path, entry in self._layout.items() if _inside(path, parts)}
        lines = differences(saved, layout(abstract_state))
        if lines:
            raise CheckpointError(
                f"checkpoint {self.folder} does not fit this run:\n{listed(lines, SHOWN, lines=True)}\nGo on with the "
                "model, adapter and optimizer settings that it was saved with, or train into another folder."
            )

    def read_parts(self, parts: Mapping[str, Any]) -> dict[str, Any]:
        """Parts of the saved state; nothing else is read.

        parts: abstract trees by their paths in the saved state, such as `trainable` or `opt_state/average`. Each leaf
        is restored onto its sharding. Raises CheckpointError, listing paths, if a part differs from what was saved.
        """
        self.check_fits(parts, parts=tuple(parts))
        if not jax.tree.leaves(parts):
            return dict(parts)
        abstract = abstract_arrays(parts)
        args = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), partial_restore=True
        )
        with reader(ocp.PyTreeCheckpointHandler()) as checkpointer:
            arrays = self.read(lambda folder: checkpointer.restore(folder / "state", args=args))
            return as_state(arrays, dict(parts))

    def read(self, restore: Callable[[Path], Any]) -> Any:
        """What `restore` returns for a path of this folder. Raises CheckpointError for any error of the library."""
        try:
            return restore(self.folder if self._plain is None else self._plain.path)
        except Exception as error:  # Orbax and TensorStore promise no types
            text = str(error).strip() if self._plain is None else self._plain.own_names(str(error).strip())
            raise CheckpointError(
                f"checkpoint {self.folder} cannot be read, though its files are those of its {manifest.NAME}: "
                f"{type(error).__name__}: {text[:500]}\nGo back to an earlier step: move {self.folder} elsewhere."
            ) from error

    def evaluated_weights(self, trainable: Any, *, use_average: bool = True) -> Any:
        """The weights to evaluate and export, as `optim.averages.evaluation_params` returns them in training.

        trainable: abstract or real, of the trained parameters. use_average: whether an average of the weights is taken
        if one was kept. Raises CheckpointError, listing paths, if they differ from what was saved.
        """
        averages = self._known_averages()
        if use_average and AVERAGE in averages:
            return self._read_like(trainable, averages[AVERAGE])
        weights = self._read_like(trainable, "trainable")
        if SCHEDULE_FREE not in averages:
            return weights
        at = averages[SCHEDULE_FREE]
        shape, dtype = self._layout[f"{at}/b1"]
        b1 = self.read_parts({f"{at}/b1": jax.ShapeDtypeStruct(tuple(shape), dtype)})[f"{at}/b1"]
        z = self._read_like(trainable, f"{at}/z")
        state = ScheduleFreeState(b1, weight_sum=0, step_count=0, max_lr=0, base_optimizer_state=None, z=z)
        return schedule_free_eval_params(state, weights)

    def _known_averages(self) -> Mapping[str, str]:
        if self._averages is None:
            raise CheckpointError(
                f"checkpoint {self.folder} does not say where averages of its weights are: an earlier version of jaxft "
                "saved it. Export it with that version, or go on with the run, which saves anew."
            )
        return self._averages

    def _read_like(self, trainable: Any, path: str) -> Any:
        """The part at `path`, whose tree is that of the trained parameters, in the dtypes that were saved."""

        def as_saved(key_path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
            _, dtype = self._layout.get(f"{path}/{path_str(key_path)}", (None, leaf.dtype))
            return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=getattr(leaf, "sharding", None))

        return self.read_parts({path: jax.tree_util.tree_map_with_path(as_saved, trainable)})[path]


def _inside(path: str, parts: tuple[str, ...]) -> bool:
    return any(not part or path == part or path.startswith(f"{part}/") for part in parts)
