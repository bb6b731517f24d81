"""From a config to the parts of a run: model with adapters, mesh, optimizer, training step and its state."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxft import models
from jaxft.adapters.added_tokens import check_added_tokens, train_added_tokens
from jaxft.adapters.critic import attach_critic
from jaxft.adapters.lora import eva
from jaxft.adapters.make import attach_adapter, go_on_with
from jaxft.adapters.prompt import initialize_prompt
from jaxft.checkpoint import hf
from jaxft.checkpoint.folders.origin import continued_adapter
from jaxft.checkpoint.folders.sums import write_sums
from jaxft.checkpoint.hf import read_json
from jaxft.checkpoint.load import LoadedModel, hf_config_of, load_model, open_weights, random_model, resolve
from jaxft.checkpoint.peft import attach_structure, check_writable, open_adapter
from jaxft.checkpoint.quantized import loftq
from jaxft.config import RunConfig
from jaxft.data.tokenizers.load import load_tokenizer, tokenizer_of
from jaxft.data.tokenizers.table import AddedRows, added_rows
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ConfigError
from jaxft.files.buckets.working_copy import folder_of
from jaxft.files.run_folder import BASE
from jaxft.methods import method_of
from jaxft.models.hf_fields import with_allowed
from jaxft.models.score_model import is_score_model
from jaxft.nn import stack
from jaxft.nn.decoder import Decoder
from jaxft.nn.storage import storage_dims_of
from jaxft.objectives.loss import MethodState
from jaxft.optim.averages import with_average
from jaxft.optim.make import make_optimizer
from jaxft.quant.narrow import FEWEST_ROWS
from jaxft.runs.going_on import going_on, merged_base
from jaxft.sharding.mesh import MeshPlan, auto_mesh, make_mesh_plan
from jaxft.sharding.processes import on_primary
from jaxft.sharding.shared_folder import uploaded
from jaxft.sharding.specs import divisors
from jaxft.training.state import TrainState, create
from jaxft.training.step import Step, make_train_step


def build_model(config: RunConfig, mesh: MeshPlan | None = None, *, random_base: Path | None = None) -> LoadedModel:
    """The base model of a run with fresh adapters, or with those that it goes on from.

    random_base: the folder in which model.random_init writes the weights that it draws, and model.adapter='merge' those
    that it merges, so that the exported adapter has a base to be loaded onto. Raises ConfigError, ModelError or
    CheckpointError.
    """
    model = config.model
    path = model.path
    if model.random_init:
        path = str(random_base or folder_of(config.output_dir) / BASE)
        on_primary(lambda: _draw_weights(config, Path(path)))
        path = uploaded(Path(path))
    elif model.adapter == "merge":
        path = uploaded(merged_base(config, random_base or folder_of(config.output_dir) / BASE))
    given: dict[str, Any] = {"revision": model.revision, "mesh": mesh, "head": method_of(config).head}
    if path == model.path:
        given |= {"base": model.base, "allow_unknown": model.allowed}
    added = added_of(config)
    config, loaded = going_on(config), load_model(path, added=added, seed=config.seed, **given, **_types(config))
    if config.adapter.kind == "none":
        loaded.file_dtype = "float32"  # the type in which all of it, or a part, is trained
    _attach(loaded.module, config, added)
    start = config.adapter.init_lora_weights
    if start.startswith("loftq"):
        source = open_weights(resolve(path, model.revision), allow_unknown=model.allowed)[1]
        loftq.initialize_loftq(loaded.module, source, start, jax.random.key(config.seed))
    if config.adapter.prompt_init_text is not None:
        initialize_prompt(
            loaded.module, load_tokenizer(path, revision=model.revision).encode(config.adapter.prompt_init_text)
        )
    if mesh is not None:
        mesh.shard_module(loaded.module)
    return loaded


def abstract_model(config: RunConfig) -> Any:
    """The model of a run with its adapters, as shapes without arrays, from config.json alone.

    Raises, before any weight is read, the errors of `build_model` for an unknown family, an adapter target that matches
    nothing, and a rank or sequence length that does not fit; and an error for adapters that PEFT cannot represent.
    """
    model = config.model
    path = resolve(model.path, model.revision)
    if model.random_init:
        hf_config = with_allowed(read_json(os.path.join(path, "config.json")), model.allowed)
    else:
        hf_config = hf_config_of(path, model.base, allow_unknown=model.allowed)
    return abstract_of(hf_config, config, added_of(config))


def added_of(config: RunConfig) -> AddedRows | None:
    """The rows of the tokens that `model.add_tokens` names; None if it names none.

    Raises ConfigError as `Tokenizer.add_tokens`, and for a model that a run goes on from, whose tokens are known.
    """
    if not config.model.added_tokens:
        return None
    if continued_adapter(config.model) is not None:
        raise ConfigError(
            f"model.add_tokens: the adapter in {config.model.path} was trained with the tokens that it has. Set "
            "model.adapter='merge' to merge it first, and to train another with more tokens."
        )
    return tokenizer_of(config).added


def abstract_of(hf_config: Any, config: RunConfig, added: AddedRows | None = None) -> Any:
    """`abstract_model` from the content of config.json.

    added: the rows of added tokens; if None, those that a tokenizer without spare rows would need.
    """
    if config.model.added_tokens:
        before = models.config_from_hf(hf_config).vocab_size
        size = before + len(config.model.added_tokens)
        added = added or added_rows(tokens=range(before, size), size=size, before=before)
        hf_config = {**models.text_config(hf_config), "vocab_size": added.rows}
    family = models.config_from_hf(_with_head(hf_config, config))
    limit = family.max_position_embeddings
    if config.data.max_length > limit:
        raise ConfigError(f"data.max_length={config.data.max_length} is beyond the model's {limit} positions")

    folder = continued_adapter(config.model)
    config = going_on(config, hf_config)

    def make() -> Any:
        model = models.random_model(family, seed=0, **_types(config))
        if folder is not None:
            opened = open_adapter(folder)
            attach_structure(model, opened, opened.change_of(model))
        _attach(model, config, added)
        return model

    model = nnx.eval_shape(make)
    if added is not None:
        check_added_tokens(model, config.model.trainable)
    check_writable(model)
    if config.adapter.by_data:
        eva.check(model, config.adapter.init_lora_weights)
    return model


def _attach(model: Decoder, config: RunConfig, added: AddedRows | None) -> None:
    """Attaches fresh adapters unless the run goes on from one, and the critic if the method trains one."""
    if continued_adapter(config.model) is None:
        attach_adapter(model, config.adapter, config.seed)
    else:
        go_on_with(model, config.adapter)
    if added is not None and config.adapter.kind != "none":
        train_added_tokens(model, added)
    if method_of(config).critic and config.adapter.kind != "none":
        attach_critic(model, config.adapter, config.seed)


def _with_head(hf_config: Any, config: RunConfig) -> Any:
    if method_of(config).head == "score":
        return models.score_config(hf_config)
    if is_score_model(hf_config):
        raise ConfigError(
            f"model.path {config.model.path} is a reward model: it has a score head in place of the LM head that "
            f"method.name={config.method.name!r} trains. Give the language model that it was made of, or set "
            "method.name='reward' to train it further."
        )
    return hf_config


def make_mesh(config: RunConfig, model: Any, devices: Sequence[jax.Device]) -> MeshPlan:
    """The mesh of a run over devices, real or of a machine that is compiled for ahead of time.

    model: from `abstract_model`. Raises ConfigError for axes that do not fit the devices, heads or positions.
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
    check_matmul_on(config, mesh)
    check_experts(model, mesh)
    check_context(model, mesh)
    return mesh


def check_matmul_on(config: RunConfig, mesh: MeshPlan) -> None:
    """Raises ConfigError if the mesh splits sums of 8-bit products, or leaves a device too few rows for them."""
    dtype = config.train.matmul_dtype
    if dtype is None:
        return
    if (count := mesh.axes["tensor"]) > 1:
        raise ConfigError(
            f"train.matmul_dtype={dtype!r} with mesh.tensor={count}: the axis would split the sums of these products, "
            "which is not tested. Use mesh.fsdp or mesh.data, or set train.matmul_dtype to None."
        )
    tokens = config.train.batch_size // config.train.accumulation_steps * config.data.max_length
    if (rows := tokens // mesh.batch_shards // mesh.axes["context"]) < FEWEST_ROWS:
        raise ConfigError(
            f"train.matmul_dtype={dtype!r}: each device has {rows:,} tokens at a time, and rounding the weights takes "
            f"longer than products of fewer than {FEWEST_ROWS:,} save. Raise train.batch_size, lower "
            "train.accumulation_steps, or set train.matmul_dtype to None."
        )


def check_experts(model: Any, mesh: MeshPlan) -> None:
    """Raises ConfigError if the model has no experts, or mesh.expert does not divide their number."""
    count = mesh.axes["expert"]
    if count > 1 and model.experts is None:
        raise ConfigError(f"mesh.expert={count}, but the model has no experts: use mesh.fsdp or mesh.data instead")
    if count > 1 and model.experts % count:
        raise ConfigError(
            f"mesh.expert={count} does not divide the model's {model.experts} experts: each device holds equally "
            f"many. Set it to one of {', '.join(map(str, divisors(model.experts)))}."
        )


def check_context(model: Any, mesh: MeshPlan) -> None:
    """Raises ConfigError if rows are split along positions, and some layers pass a state along them."""
    count = mesh.axes["context"]
    if count > 1 and any(block.recurrent for block in model.config.shape().layers):
        raise ConfigError(
            f"mesh.context={count} splits rows along their positions, and recurrent layers of this model pass a state "
            "along them. Use mesh.fsdp or mesh.tensor instead."
        )


def make_step(
    config: RunConfig,
    model: Decoder,
    graphdef: nnx.GraphDef[Decoder],
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
) -> Step:
    """The training step of a run, to be jitted within its mesh. model: from `abstract_model`."""
    method = method_of(config)
    return make_train_step(
        graphdef,
        method.loss(config, model),
        tx,
        schedule,
        accumulation_steps=config.train.accumulation_steps,
        gradient_dtype=jnp.dtype(config.train.gradient_dtype or config.model.dtype),
        batch_sums=method.batch_sums(config, model),
        skips_empty=method.skips_empty,
        next_saved=method.next_saved(config),
        on_spike=config.train.on_spike,
    )


def start_state(
    config: RunConfig, model: Decoder, tx: optax.GradientTransformation, mesh: MeshPlan | None = None
) -> tuple[nnx.GraphDef[Decoder], TrainState]:
    """(graphdef, state at step 0) of a run, with the state of its method. mesh: the devices of the state.

    model: with the base weights and fresh adapters; abstract under `jax.eval_shape`. A frozen model of the method is
    added by `with_frozen`.
    """
    graphdef, state = create(model, tx, config.seed)
    # Copies, because the step donates its state: an array in it twice could not be donated.
    method = jax.tree.map(jnp.copy, method_of(config).initial_state(config, state.trainable))
    state = state._replace(method=method)
    return graphdef, state if mesh is None else mesh.shard(state, storage_dims_of(model))


def with_frozen(state: TrainState, frozen: Mapping[str, Any]) -> TrainState:
    """The state with the fields of `MethodState` that hold the method's frozen model; unchanged if there are none."""
    return state._replace(method=(state.method or MethodState())._replace(**frozen)) if frozen else state


def load_frozen(config: RunConfig, mesh: MeshPlan, base: Decoder | None = None) -> dict[str, Any]:
    """The frozen model that is in memory while the run trains, on the mesh, as fields of `MethodState`; {} if none is.

    base: the model that is trained, on the mesh, whose frozen weights a reward model may share; None: it has its own.
    """
    frozen = method_of(config).frozen(config)
    return {frozen.part: frozen.arrays(mesh, base)} if frozen is not None and frozen.in_memory else {}


def check_frozen(config: RunConfig, model: Decoder, tokenizer: Tokenizer, mesh: MeshPlan) -> None:
    """Refuses a frozen model of the method before its weights are read, by its config.json and its tokenizer.

    model: of the run, abstract. Raises ConfigError as `FrozenModel` does, and if the mesh does not fit its heads.
    """
    frozen = method_of(config).frozen(config)
    if frozen is None:
        return
    length = config.data.max_length
    sizes = frozen.abstract(frozen.hf_config(), student=model, max_length=length).config
    frozen.check_tokenizer(tokenizer)
    mesh.check_sizes(heads=sizes.num_attention_heads, kv_heads=sizes.num_key_value_heads, max_length=length)


def make_tx(config: RunConfig, model: Decoder, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of a run, including the average of weights if it keeps one. model: may be abstract."""
    tx = make_optimizer(config.optim, schedule, seed=config.seed, stacks=stack.group_layers(model.segments))
    return tx if config.train.ema_decay is None else with_average(tx, config.train.ema_decay)


def _draw_weights(config: RunConfig, folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    dtype = _storage(config)
    types = {"dtype": dtype, "param_dtype": dtype}
    drawn = random_model(config.model.path, seed=config.seed, allow_unknown=config.model.allowed, **types)
    hf.write_weights(drawn.module, str(folder))
    load_tokenizer(config.model.path).save(folder)
    # Last: its presence says that the folder is whole.
    hf.write_config(str(folder), drawn.hf_config, dtype=dtype)
    write_sums(folder)


def _types(config: RunConfig) -> dict[str, Any]:
    """Options of the model of a run."""
    model = config.model
    # What trains has its policy by then (runs/memory/recomputation); elsewhere it changes nothing.
    remat = "none" if model.remat == "auto" else model.remat
    types = {"dtype": model.dtype, "param_dtype": _storage(config), "remat": remat}
    return types | {"quantization": model.quantization, "trainable": model.trainable}


def _storage(config: RunConfig) -> str:
    # Trained weights are float32: full fine-tuning in bfloat16 would lose updates below its rounding.
    whole = config.adapter.kind == "none" and config.model.trainable is None
    return "float32" if whole else config.model.param_dtype
