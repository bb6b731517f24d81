"""Models whose layers have inputs of their own and share keys and values (Gemma 4 E2B, E4B), against transformers."""

import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxft import models
from jaxft.adapters.attach import adapters, attach
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.adapters.prefix import attach_prefix
from jaxft.adapters.prompt import attach_prompt
from jaxft.checkpoint import peft as peft_format
from jaxft.checkpoint.hf import param_tensors, write_weights
from jaxft.checkpoint.load import load_model
from jaxft.config import MeshConfig
from jaxft.data.batch import Batch
from jaxft.data.prompts import Prompt
from jaxft.data.tokenizers.table import AddedRows
from jaxft.errors import ModelError
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.hardware.sizes import sizes_of
from jaxft.nn.param_kind import Constant
from jaxft.objectives.policy.loss import policy_logps
from jaxft.objectives.sft import sft_loss
from jaxft.planning.decoding import Decoding
from jaxft.rollouts.packed import pack_rollouts
from jaxft.rollouts.rollout import Rollout
from jaxft.rollouts.shared_prompts import pack_with_shared_prompts
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.trees import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SLIDING, FULL = "sliding_attention", "full_attention"
# Two patterns with keys of their own, then two without; the window is shorter than the texts below.
SMALL = {
    "vocab_size": 96, "vocab_size_per_layer_input": 96, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 10, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "sliding_window": 6, "head_dim": 8,
    "global_head_dim": 16, "final_logit_softcapping": 4.0, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True, "layer_types": [SLIDING, SLIDING, FULL] * 2 + [SLIDING, FULL] * 2,
    "rope_parameters": {
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 100.0},
        SLIDING: {"rope_type": "default", "rope_theta": 50.0},
    },
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 96, (2, 20))
PROMPTS = [np.random.default_rng(n).integers(1, 96, n).tolist() for n in (16, 3, 12, 1)]


def center(name):
    """The mean of a tensor's drawn values. Larger scores would make softmax so sharp that float32's rounding shows."""
    return 0.5 if "q_norm" in name or "k_norm" in name else float("norm" in name or name.endswith("layer_scalar"))


class Case:
    """A tiny model as a folder, as transformers' module and as ours."""

    def __init__(self, folder):
        self.folder = folder
        config = transformers.AutoConfig.for_model("gemma4_text", **SMALL)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            buffers = [(name, x) for name, x in model.named_buffers() if name in model.state_dict()]
            for name, parameter in (*model.named_parameters(), *buffers):
                parameter.normal_(center(name), 0.1, generator=generator)
        model.save_pretrained(folder)
        self.hf = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))

    def theirs(self):
        return transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @functools.cached_property
    def ours(self):
        return load_model(self.folder)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(str(tmp_path_factory.mktemp("per_layer")))


def batch_of(tokens, segments=None, positions=None):
    segments = np.ones_like(tokens) if segments is None else segments
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    weights = np.ones(tokens.shape, np.float32)
    weights[:, -1] = 0
    return Batch(*map(jnp.asarray, (tokens, np.roll(tokens, -1, axis=1), weights, positions, segments)))


def loss_and_gradients(model, batch):
    graphdef, state = nnx.split(model)

    def mean_loss(state):
        sums = sft_loss(nnx.merge(graphdef, state), batch, None)
        return sums.total / sums.weight

    value, grads = jax.jit(jax.value_and_grad(mean_loss))(state)
    return float(value), flatten(grads)[0]


def test_layers_that_share_are_stacked_and_have_no_keys(case):
    model = case.ours.module
    assert [type(group.attention).__name__ for group in model.layers] == ["Attention"] * 3 + ["BorrowedAttention"] * 2
    paths = flatten(nnx.state(model))[0]
    assert not [path for path in paths if path.startswith(("layers/3/", "layers/4/")) and "/k_" in path]
    assert [group.mlp.shape.hidden for group in model.layers] == [48] * 3 + [96] * 2
    cache = model.init_cache(2, 32)
    assert [part is None for part in cache] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("trainable", ["layers.4.mlp", "layers.7,layers.1.self_attn"])
def test_keys_are_found_however_layers_are_stacked(case, trainable):
    """Layers that are trained are in other stacks than those that are not."""
    loaded = load_model(case.folder, trainable=trainable)
    assert len(loaded.module.layers) > len(case.ours.module.layers)
    np.testing.assert_allclose(loaded.logits(TOKENS), case.ours.logits(TOKENS), rtol=0, atol=1e-5)


def test_logits(case):
    with torch.no_grad():
        expected = case.theirs()(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(case.ours.logits(TOKENS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full", "dots", "attention"])
def test_gradients_of_the_mean_loss(case, remat):
    reference = case.theirs()
    loss = reference(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss
    loss.backward()
    expected = {name: p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None}
    model = load_model(case.folder, remat=remat).module
    value, grads = loss_and_gradients(model, batch_of(TOKENS))
    assert value == pytest.approx(loss.item(), abs=1e-5)
    constants, seen = flatten(nnx.state(model, Constant))[0], set()
    for path, placed in param_tensors(model).items():
        for piece in () if path in constants else placed.pieces:
            ours = placed.transform.to_hf(np.asarray(grads[path][piece.at]))
            np.testing.assert_allclose(ours, expected[piece.hf], rtol=0, atol=1e-4, err_msg=piece.hf)
            seen.add(piece.hf)
    assert seen == set(expected)
    last = "model.layers.5.self_attn.v_proj.weight"  # which the last layers use too
    assert np.abs(expected[last]).max() > 1e-3


def test_greedy_generation(case):
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])
    with torch.no_grad():
        out = case.theirs().generate(padded, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0)
    ours = generate_tokens(case.ours.module, PROMPTS, sampling=Sampling(max_new_tokens=32), slots=3)
    assert [list(r.tokens) for r in ours] == out[:, longest:].tolist()


def test_a_prompt_in_pieces_is_the_prompt_at_once(case):
    """A later piece sees keys of the earlier one that a window's cache loses while the piece is written."""
    model = case.ours.module
    at_once, _ = model(jnp.asarray(TOKENS))
    cache, pieces = model.init_cache(2, 32), []
    for start, stop in ((0, 9), (9, 17), (17, 18), (18, 20)):
        positions = np.broadcast_to(np.arange(start, stop), (2, stop - start))
        hidden, cache = model(jnp.asarray(TOKENS[:, start:stop]), jnp.asarray(positions), cache=cache)
        pieces.append(hidden)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), at_once, rtol=0, atol=2e-5)


def test_packed_documents_are_as_if_each_were_alone(case):
    lengths = (7, 9, 4)
    ends = np.cumsum(lengths)
    tokens = TOKENS[:1]
    segments = np.repeat(np.arange(1, 4), lengths)[None]
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    together, _ = case.ours.module(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments))
    for length, end in zip(lengths, ends, strict=True):
        alone, _ = case.ours.module(jnp.asarray(tokens[:, end - length : end]))
        np.testing.assert_allclose(together[:, end - length : end], alone, rtol=0, atol=1e-5)


def test_documents_that_share_their_prompt_are_as_if_each_were_alone(case):
    model = case.ours.module
    rollouts = [
        Rollout(
            prompt=Prompt(tokens=TOKENS[1, :11], mask=np.zeros(11, np.uint8), row=0, messages="", where=""),
            number=n, group=0, tokens=TOKENS[0, :n], sampled=np.ones(n, bool), logprobs=np.zeros(n),
            finish_reason="stop", text="",
        )
        for n in (9, 4, 12)
    ]  # fmt: skip
    packed = pack_with_shared_prompts(rollouts, max_length=48, pad_id=0)
    together = packed.tokens_of(np.asarray(policy_logps(model, jax.tree.map(jnp.asarray, packed.batch))))
    for one, logps in zip(rollouts, together, strict=True):
        alone = pack_rollouts([one], max_length=48, pad_id=0)
        expected = alone.tokens_of(np.asarray(policy_logps(model, jax.tree.map(jnp.asarray, alone.batch))))
        np.testing.assert_allclose(logps, expected[0], rtol=0, atol=1e-5)


def test_weights_and_config_survive_the_way_in_and_out(case, tmp_path):
    write_weights(case.ours.module, str(tmp_path))
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (case.folder, tmp_path))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name].view(np.uint32), after[name].view(np.uint32), err_msg=name)
    config = models.config_from_hf(case.hf)
    assert models.config_from_hf(config.to_hf()) == config
    theirs = transformers.AutoConfig.for_model(**config.to_hf()).to_dict()
    assert models.config_from_hf(theirs) == config


def test_keys_of_layers_that_share_are_left_out_and_told_of(case, tmp_path):
    tensors = load_file(Path(case.folder) / "model.safetensors")
    kinds = case.hf["layer_types"]
    for layer in range(6, 10):
        head_dim = 8 if kinds[layer] == SLIDING else 16
        for name, shape in (("k_proj", (2 * head_dim, 32)), ("v_proj", (2 * head_dim, 32)), ("k_norm", (head_dim,))):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = np.full(shape, 7, np.float32)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(case.hf))
    loaded = load_model(str(tmp_path))
    assert any("12 tensors of 6,192 numbers are for keys and values" in note for note in loaded.notes), loaded.notes
    np.testing.assert_array_equal(loaded.logits(TOKENS), case.ours.logits(TOKENS))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_shared_layers": 10}, "num_kv_shared_layers=10 of 10 layers"),
        ({"num_kv_shared_layers": 8}, "no layer of type full_attention is before these"),
        ({"vocab_size_per_layer_input": 95}, "vocab_size_per_layer_input=95 and vocab_size=96"),
        ({"model_type": "gemma4_unified_text", "num_experts": None}, "hidden_size_per_layer_input=8"),
    ],
)
def test_what_does_not_fit_is_refused(case, fields, message):
    with pytest.raises(ModelError, match=message):
        models.config_from_hf(case.hf | fields)


@pytest.mark.parametrize("axes", [{"fsdp": 4, "tensor": 2}, {"fsdp": 2, "context": 4}])
def test_eight_devices_equal_one(case, axes):
    mesh = make_mesh_plan(MeshConfig(**axes))
    split = load_model(case.folder, mesh=mesh)
    table = split.module.per_layer.embed_tokens_per_layer.embedding.get_value()
    assert table.sharding.spec == split.module.embed_tokens.embedding.get_value().sharding.spec
    assert not table.sharding.is_fully_replicated
    graphdef, state = nnx.split(split.module)

    def logits(state, tokens_BS):
        module = nnx.merge(graphdef, state)
        return module.unembed(module(tokens_BS)[0])

    rows = np.tile(TOKENS, (4, 1))
    got = jax.jit(mesh.bind(logits))(state, jax.device_put(rows, mesh.batch_sharding()))
    np.testing.assert_allclose(got, np.tile(case.ours.logits(TOKENS), (4, 1, 1)), rtol=0, atol=1e-5)


def test_gradients_of_eight_devices_equal_those_of_one(case):
    mesh = make_mesh_plan(MeshConfig(fsdp=2, context=2, tensor=2))
    graphdef, state = nnx.split(load_model(case.folder, mesh=mesh, remat="full").module)
    rows = np.concatenate([TOKENS, TOKENS[:, ::-1]])
    batch = jax.device_put(batch_of(rows), mesh.batch_sharding())

    def mean_loss(state, batch):
        sums = sft_loss(nnx.merge(graphdef, state), batch, None)
        return sums.total / sums.weight

    value, grads = jax.jit(mesh.bind(jax.value_and_grad(mean_loss)))(state, batch)
    expected, reference = loss_and_gradients(case.ours.module, batch_of(rows))
    assert float(value) == pytest.approx(expected, abs=1e-5)
    for path, grad in flatten(grads)[0].items():
        np.testing.assert_allclose(grad, reference[path], rtol=0, atol=1e-5, err_msg=path)


def nested_folder(case, folder):
    """The model as the text part of one that takes images too."""
    tensors = load_file(Path(case.folder) / "model.safetensors")
    nested = {name.replace("model.", "model.language_model.", 1): x for name, x in tensors.items()}
    nested["model.language_model.layers.9.self_attn.k_norm.weight"] = np.ones(16, np.float32)
    nested["model.vision_tower.patch_embedder.weight"] = np.ones(4, np.float32)
    save_file(nested, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "gemma4", "text_config": case.hf, "architectures": ["Gemma4ForConditionalGeneration"]}
    (folder / "config.json").write_text(json.dumps(config))


def test_the_text_part_of_a_model_that_takes_images_too(case, tmp_path):
    nested_folder(case, tmp_path)
    loaded = load_model(str(tmp_path))
    np.testing.assert_array_equal(loaded.logits(TOKENS), case.ours.logits(TOKENS))
    attach(loaded.module, ["all-linear"], lora_factory(LoRASettings(r=2, alpha=4.0)), jax.random.key(0))
    peft_format.write_adapter(loaded.module, str(tmp_path), base="base", nested=True)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    outer = "model.language_model"
    for name in ("per_layer_model_projection", "layers.0.per_layer_projection", "layers.9.mlp.up_proj"):
        assert re.fullmatch(targets, f"{outer}.{name}"), name
    for name in ("embed_tokens_per_layer", "layers.0.per_layer_projection_norm", "per_layer_projection_norm"):
        assert not re.fullmatch(targets, f"{outer}.{name}"), name
    assert not re.fullmatch(targets, "model.vision_tower.layers.0.mlp.up_proj")


def test_adapters_on_every_linear_layer_mean_the_same_to_peft(case, tmp_path):
    peft = pytest.importorskip("peft")
    loaded = load_model(case.folder)
    paths = attach(loaded.module, ["all-linear"], lora_factory(LoRASettings(r=2, alpha=4.0)), jax.random.key(0))
    assert {path.rsplit("/", 1)[-1] for path in paths} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "per_layer_input_gate",
        "per_layer_projection", "per_layer_model_projection",
    }  # fmt: skip
    for i, adapter in enumerate(adapters(loaded.module).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(i), adapter.lora_b.get_value().shape))
    peft_format.write_adapter(loaded.module, str(tmp_path), base=case.folder)
    ours = loaded.logits(TOKENS)
    assert np.abs(ours - case.ours.logits(TOKENS)).max() > 1e-2
    model = peft.PeftModel.from_pretrained(case.theirs(), str(tmp_path))
    wrapped = {name.removesuffix(".lora_A.default") for name, _ in model.named_modules() if name.endswith("_A.default")}
    linear = {name for name, x in case.theirs().named_modules() if isinstance(x, torch.nn.Linear) and name != "lm_head"}
    assert {name.removeprefix("base_model.model.") for name in wrapped} == linear
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    again = load_model(case.folder)
    peft_format.read_adapter(again.module, str(tmp_path))
    (first, _), (second, _) = (flatten(nnx.state(m)) for m in (loaded.module, again.module))
    assert first.keys() == second.keys()
    for path in first:
        np.testing.assert_array_equal(first[path], second[path], err_msg=path)


@pytest.mark.parametrize("target", ["per_layer_model_projection", "per_layer_input_gate", "per_layer_projection"])
def test_dropout_reaches_every_adapter(case, target):
    loaded = load_model(case.folder)
    settings = LoRASettings(r=2, alpha=4.0, dropout=0.5)
    attach(loaded.module, [target], lora_factory(settings), jax.random.key(0))
    for i, adapter in enumerate(adapters(loaded.module).values()):
        adapter.lora_b.set_value(jax.random.normal(jax.random.key(i), adapter.lora_b.get_value().shape))
    without, one, other = (
        loaded.module(jnp.asarray(TOKENS), key=key)[0] for key in (None, *map(jax.random.key, (1, 2)))
    )
    assert np.abs(one - without).max() > 1e-3 and np.abs(one - other).max() > 1e-3


def test_plans_count_the_new_parameters(case):
    model = models.abstract_model(models.config_from_hf(case.hf))
    sizes = sizes_of(model)
    shapes = {name: x.shape for name, x in load_file(Path(case.folder) / "model.safetensors").items()}
    assert sizes.parameters == sum(map(math.prod, shapes.values()))
    # Every matrix multiplies each token but the second table, of which a token takes one row.
    matrices = {name: shape for name, shape in shapes.items() if len(shape) == 2 and "per_layer.weight" not in name}
    assert sizes.active == sum(map(math.prod, matrices.values())) < sizes.parameters
    assert [group.layers for group in sizes.attention] == [2] * 5
    params = nnx.state(load_model(case.folder).module)
    decoding = Decoding(step=None, size=None, graphdef=None, params=params, copied=False)
    assert decoding.param_bytes - decoding.read_bytes == 4 * math.prod(shapes["model.embed_tokens_per_layer.weight"])


def test_virtual_and_added_tokens_are_refused(case):
    with pytest.raises(ModelError, match="virtual tokens have no rows in the table of the layers' inputs"):
        attach_prompt(load_model(case.folder).module, jnp.arange(3))
    with pytest.raises(ModelError, match="virtual tokens have no rows in the table of the layers' inputs"):
        attach_prefix(load_model(case.folder).module, 3, jax.random.key(0))
    added = AddedRows(tokens=(96,), fresh=(96,), before=96, rows=97, known=96)
    with pytest.raises(ModelError, match="model.add_tokens: rows of embed_tokens_per_layer"):
        load_model(case.folder, added=added)
