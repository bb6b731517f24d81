"""Several PEFT folders on one base, and what becomes of them back to such folders."""

from collections.abc import Mapping

from jaxft.adapters.named import AdapterSet, take
from jaxft.adapters.saved import saved_paths
from jaxft.checkpoint.load import LoadedModel, resolve
from jaxft.checkpoint.peft import read_adapter, write_adapter
from jaxft.errors import ModelError
from jaxft.sharding.mesh import MeshPlan


def load_adapters(model: LoadedModel, folders: Mapping[str, str], *, mesh: MeshPlan | None = None) -> AdapterSet:
    """Reads PEFT or run folders onto a base under names; none is active yet.

    model: a base without adapter. folders: by name. mesh: where the base is, and the adapters go. Raises
    CheckpointError or ModelError as for one of them alone, and ModelError where the model has an adapter already.
    """
    held = AdapterSet(model.module)
    for name, folder in folders.items():
        read_adapter(model.module, resolve(folder))
        if saved_paths(model.module):
            raise ModelError(
                f"adapter {name!r} holds modules of the base that were trained whole (modules_to_save): load it by "
                "itself, not as one of several, onto a base that is loaded anew"
            )
        if mesh is not None:
            mesh.shard_module(model.module)
        held.add(name, take(model.module))
    return held


def write_named(held: AdapterSet, name: str, folder: str, *, model: LoadedModel) -> None:
    """Writes one of them as a PEFT folder, whichever is active. model: the base that it is of."""
    active, trained = held.active, held.trained
    held.activate(name)
    write_adapter(model.module, folder, base=model.base, nested=model.left_out is not None)
    held.activate(*active, train=trained)
