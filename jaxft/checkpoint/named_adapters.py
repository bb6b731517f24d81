"""Several adapters on one base, read from PEFT folders and written back to them."""

from collections.abc import Mapping
from functools import partial

from jaxft.adapters.named import AdapterSet, take
from jaxft.adapters.saved import carried_paths, saved_paths
from jaxft.checkpoint.folders.sums import write_sums
from jaxft.checkpoint.load import LoadedModel, resolve
from jaxft.checkpoint.peft import read_adapter, write_adapter
from jaxft.errors import ModelError
from jaxft.files.targets import begin_folder, end_folder
from jaxft.home import local_path
from jaxft.sharding.mesh import MeshPlan
from jaxft.sharding.processes import on_primary


def load_adapters(model: LoadedModel, folders: Mapping[str, str], *, mesh: MeshPlan | None = None) -> AdapterSet:
    """Reads PEFT or run folders as named adapters of a base; none is active yet.

    model: a base without an adapter. folders: path by name. mesh: the mesh of the base, over which the adapters are
    split too. Raises CheckpointError or ModelError as `read_adapter` does, and ModelError if the model has an adapter
    already.
    """
    adapter_set = AdapterSet(model.module)
    for name, folder in folders.items():
        read_adapter(model.module, resolve(folder))
        whole = saved_paths(model.module) + carried_paths(model.module)
        if whole or model.module.token_rows is not None:
            raise ModelError(
                f"adapter {name!r} holds modules of the base that were trained in full (modules_to_save), or rows of "
                "its tables: load it alone, with load_model, onto a base of its own"
            )
        if mesh is not None:
            mesh.shard_module(model.module)
        adapter_set.add(name, take(model.module))
    return adapter_set


def write_named(adapter_set: AdapterSet, name: str, folder: str, *, model: LoadedModel) -> None:
    """Writes the adapter `name` as a PEFT folder, regardless of the active adapters. model: the base of the set.

    Raises ExportError if the folder is a file, is not empty or cannot be made.
    """
    unfinished = on_primary(partial(begin_folder, local_path(folder)))
    active, trained = adapter_set.active, adapter_set.trained
    adapter_set.activate(name)
    write_adapter(model.module, unfinished, base=model.base, nested=model.left_out is not None)
    adapter_set.activate(*active, train=trained)
    on_primary(partial(end_folder, unfinished, local_path(folder)))
    on_primary(partial(write_sums, local_path(folder)))
