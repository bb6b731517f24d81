"""From a config to a model on its devices, with its adapters, ready to train or to answer."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft import models
from jaxft.adapters import eva
from jaxft.adapters.make import attach_adapter
from jaxft.adapters.prompt import begin_as
from jaxft.checkpoint import hf
from jaxft.checkpoint.hf import read_json
from jaxft.checkpoint.load import LoadedModel, hf_config_of, load_model, open_weights, random_model, resolve
from jaxft.checkpoint.peft import check_writable
from jaxft.checkpoint.quantized import loftq
from jaxft.config import RunConfig
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ConfigError
from jaxft.files.run_folder import BASE
from jaxft.nn import stack
from jaxft.objectives.router import RouterCoefficients
from jaxft.objectives.sft import sft_loss
from jaxft.objectives.token_loss import TokenLoss
from jaxft.optim.averages import evaluated, with_average
from jaxft.optim.make import make_optimizer
from jaxft.sharding.arrays import put_global
from jaxft.sharding.mesh import MeshPlan, auto_mesh, make_mesh_plan
from jaxft.sharding.processes import on_primary
from jaxft.sharding.rules import divisors
from jaxft.training.state import TrainState
from jaxft.training.step import Step, make_train_step


def build_model(config: RunConfig, mesh: MeshPlan | None = None, *, random_base: Path | None = None) -> LoadedModel:
    """The base model of a run with fresh adapters.

    random_base: where model.random_init writes the weights that it draws, so that the adapter has a base
    to be loaded onto. Raises ConfigError, ModelError or CheckpointError.
    """
    model = config.model
    path = model.path
    if model.random_init:
        path = str(random_base or Path(config.output_dir) / BASE)
        on_primary(lambda: _draw_weights(config, Path(path)))
    loaded = load_model(path, revision=model.revision, mesh=mesh, **_types(config))
    if loaded.adapter is not None:
        raise ConfigError(
            f"model.path {model.path} is a PEFT folder. To train further, first merge it: "
            f"jaxft export --model={model.path} --format=merged --to=NEW_FOLDER"
        )
    attach_adapter(loaded.module, config.adapter, config.seed)
    start = config.adapter.init_lora_weights
    if start.startswith("loftq"):
        source = open_weights(resolve(path, model.revision))[1]
        loftq.initialize_loftq(loaded.module, source, start, jax.random.key(config.seed))
    if config.adapter.prompt_init_text is not None:
        begin_as(loaded.module, load_tokenizer(path, revision=model.revision).encode(config.adapter.prompt_init_text))
    if mesh is not None:
        nnx.update(loaded.module, place(nnx.state(loaded.module), mesh))
    return loaded


def abstract_model(config: RunConfig) -> Any:
    """The model of a run with its adapters and no memory, from config.json alone.

    Raises what `build_model` would raise for the model's family, an adapter target that matches nothing, a
    rank or a sequence length that does not fit, and for adapters that PEFT's folders have no form for, before
    any weight is read.
    """
    path = resolve(config.model.path, config.model.revision)
    hf_config = read_json(os.path.join(path, "config.json")) if config.model.random_init else hf_config_of(path)
    return abstract_of(hf_config, config)


def abstract_of(hf_config: Any, config: RunConfig) -> Any:
    """`abstract_model` from a config.json that has been read."""
    family = models.config_from_hf(hf_config)
    limit = family.max_position_embeddings
    if config.data.max_length > limit:
        raise ConfigError(f"data.max_length={config.data.max_length} is beyond the model's {limit} positions")

    def make() -> Any:
        model = models.random_model(family, seed=0, **_types(config))
        attach_adapter(model, config.adapter, config.seed)
        return model

    model = nnx.eval_shape(make)
    check_writable(model)
    if config.adapter.by_data:
        eva.check(model, config.adapter.init_lora_weights)
    return model


def make_mesh(config: RunConfig, model: Any, devices: Sequence[jax.Device]) -> MeshPlan:
    """The mesh of a run over devices, which may be those of a machine that is compiled for ahead of time.

    model: what `abstract_model` gives. Raises ConfigError for axes that do not fit devices, heads or positions.
    """
    sizes, length = model.config, config.data.max_length
    heads = {"heads": sizes.num_attention_heads, "kv_heads": sizes.num_key_value_heads, "max_length": length}
    axes = config.mesh
    if axes.auto:
        slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
        rows = config.train.batch_size // config.train.accumulation_steps
        axes = auto_mesh(len(devices), rows=rows, slices=slices, **heads)
    mesh = make_mesh_plan(axes, devices)
    mesh.check_sizes(**heads)
    check_experts(model, mesh)
    return mesh


def check_experts(model: Any, mesh: MeshPlan) -> None:
    """Raises ConfigError where mesh.expert does not divide the model's experts, or it has none."""
    count = mesh.axes["expert"]
    if count > 1 and model.experts is None:
        raise ConfigError(f"mesh.expert={count}, but the model has no experts: use mesh.fsdp or mesh.data instead")
    if count > 1 and model.experts % count:
        raise ConfigError(
            f"mesh.expert={count} does not divide the model's {model.experts} experts: each device takes equally "
            f"many. Set it to one of {divisors(model.experts)}."
        )


def make_step(config: RunConfig, model: Any, graphdef: Any, tx: Any, schedule: Any) -> Step:
    """The training step of a run, to be jitted within its mesh. model: what `abstract_model` gives."""
    train, sft = config.train, config.method.sft
    loss = functools.partial(
        sft_loss,
        router=router_coefficients(config, model),
        token_loss=TokenLoss(label_smoothing=sft.label_smoothing_factor, z_loss=sft.z_loss, dft=sft.loss_type == "dft"),
        neftune_noise_alpha=sft.neftune_noise_alpha,
    )
    return make_train_step(
        graphdef,
        loss,
        tx,
        schedule,
        accumulation_steps=train.accumulation_steps,
        gradient_dtype=jnp.dtype(train.gradient_dtype or config.model.dtype),
    )


def make_tx(config: RunConfig, model: Any, schedule: Any) -> Any:
    """The optimizer of a run, its average of weights included. model: may be abstract."""
    tx = make_optimizer(config.optim, schedule, seed=config.seed, stacks=stack.group_layers(model.segments))
    return tx if config.train.ema_decay is None else with_average(tx, config.train.ema_decay)


def evaluated_weights(config: RunConfig, state: TrainState) -> Any:
    """The trained parameters as a run's held-out losses, scores and exports have them."""
    return evaluated(state.opt_state, state.trainable, use_average=config.train.use_ema)


def router_coefficients(config: RunConfig, model: Any) -> RouterCoefficients | None:
    """What losses on the routers count in a run; None where they do not.

    Where the config leaves load_balancing out, it is the model's router_aux_loss_coef, if its routers train.
    Raises ConfigError where such a loss is asked for and there are no routers.
    """
    balancing, z_loss = config.router.load_balancing, config.router.z_loss
    if model.experts is None and (balancing or z_loss):
        raise ConfigError(
            f"router.load_balancing={balancing} and router.z_loss={z_loss} are losses on the routers of experts, "
            "which this model does not have: set them to None and 0"
        )
    if balancing is None:
        balancing = model.config.router_aux_loss_coef if _routers_move(config, model) else 0.0
    return RouterCoefficients(load_balancing=balancing, z_loss=z_loss) if balancing or z_loss else None


def _routers_move(config: RunConfig, model: Any) -> bool:
    if model.experts is None or config.adapter.kind != "none":
        return False
    return model.trainable_paths is None or any("/router/" in path for path in model.trainable_paths)


def _draw_weights(config: RunConfig, folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    dtype = _storage(config)
    drawn = random_model(config.model.path, seed=config.seed, dtype=dtype, param_dtype=dtype)
    hf.write_weights(drawn.module, str(folder))
    load_tokenizer(config.model.path).save(folder)
    # Last: its presence says that the folder is whole.
    hf.write_config(str(folder), drawn.hf_config, dtype=dtype)


def _types(config: RunConfig) -> dict[str, Any]:
    """How the model of a run is made."""
    model = config.model
    types = {"dtype": model.dtype, "param_dtype": _storage(config), "remat": model.remat}
    return types | {"quantization": model.quantization, "trainable": model.trainable}


def _storage(config: RunConfig) -> str:
    # What moves is float32: full fine-tuning in bfloat16 would lose updates below its rounding.
    whole = config.adapter.kind == "none" and config.model.trainable is None
    return "float32" if whole else config.model.param_dtype


def place(tree: Any, mesh: MeshPlan) -> Any:
    """A pytree on the mesh's devices by the path rules."""
    return jax.tree.map(put_global, tree, mesh.shardings(tree))
