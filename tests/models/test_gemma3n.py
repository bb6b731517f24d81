"""Gemma 3n: what its residual of several streams adds to the families' common tests, against transformers and PEFT."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxft import models
from jaxft.adapters.attach import adapters, attach, find, key_of, linears, set_adapter
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.assets import ASSETS
from jaxft.checkpoint import peft as peft_format
from jaxft.checkpoint.hf import param_tensors
from jaxft.checkpoint.load import load_model
from jaxft.config import MeshConfig
from jaxft.data.batch import Batch
from jaxft.errors import ModelError
from jaxft.hardware.sizes import StreamGroup, sizes_of
from jaxft.nn.mlp import above_quantile
from jaxft.nn.norm import NormShape
from jaxft.nn.residual.altup import AltUp, AltUpShape, Streams
from jaxft.nn.residual.laurel import Laurel
from jaxft.objectives.sft import sft_loss
from jaxft.quant import is_quantized
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.trees import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SLIDING, FULL = "sliding_attention", "full_attention"
# A stack of two layers, and one of two without keys; the window is shorter than the texts below.
SMALL = {
    "model_type": "gemma3n_text", "vocab_size": 96, "vocab_size_per_layer_input": 80, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0, "sliding_window": 6,
    "head_dim": 8, "final_logit_softcapping": 4.0, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
    "layer_types": [SLIDING] * 4, "activation_sparsity_pattern": [0.7, 0.7, 0.0, 0.0], "laurel_rank": 6,
    "rope_theta": 100.0, "rope_local_base_freq": 50.0, "altup_correct_scale": False,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 96, (4, 16))
SMALL_MATRICES = ("modality_router", "prediction_coefs", "correction_coefs")


def drawn(fields):
    """transformers' model with wide random parameters; smaller for norms of heads, so that no softmax is sharp."""
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            center = 0.5 if "q_norm" in name or "k_norm" in name else float("norm" in name)
            parameter.normal_(center, 0.1 if parameter.ndim == 1 else 0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("gemma3n")
    drawn(SMALL).save_pretrained(path)
    return str(path)


def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.slow
def test_gradients_of_eight_devices_with_all_recomputed(folder):
    reference = theirs(folder)
    loss = reference(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss
    loss.backward()
    expected = {name: p.grad.numpy() for name, p in reference.named_parameters() if p.grad is not None}
    mesh = make_mesh_plan(MeshConfig(fsdp=2, context=2, tensor=2))
    model = load_model(folder, mesh=mesh, remat="full").module
    assert [len(stack.altup.correct_output_scale.get_value()) for stack in model.layers] == [2, 2]
    graphdef, state = nnx.split(model)
    weights = np.ones(TOKENS.shape, np.float32)
    weights[:, -1] = 0
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    batch = Batch(TOKENS, np.roll(TOKENS, -1, axis=1), weights, positions, np.ones_like(TOKENS))

    def mean_loss(state, batch):
        sums = sft_loss(nnx.merge(graphdef, state), batch, None)
        return sums.total / sums.weight

    batch = jax.device_put(batch, mesh.batch_sharding())
    value, grads = jax.jit(mesh.bind(jax.value_and_grad(mean_loss)))(state, batch)
    assert float(value) == pytest.approx(loss.item(), abs=1e-5)
    grads, seen = flatten(grads)[0], set()
    for path, placed in param_tensors(model).items():
        for piece in placed.pieces:
            ours = placed.transform.to_hf(np.asarray(grads[path][piece.at]))
            if piece.hf.endswith("correct_output_scale"):  # off in this model
                assert piece.hf not in expected and not ours.any()
                continue
            np.testing.assert_allclose(ours, expected[piece.hf], rtol=0, atol=1e-4, err_msg=piece.hf)
            seen.add(piece.hf)
    assert seen == set(expected)


def test_adapters_on_the_matrices_of_the_streams_mean_the_same_to_peft(folder, tmp_path):
    """Also on those that `all-linear` leaves out. A list's name means all its layers."""
    peft = pytest.importorskip("peft")
    loaded = load_model(folder)
    in_all = {path.rsplit("/", 1)[-1] for path in find(loaded.module, ["all-linear"])}
    assert {"0", "1", "2", "linear_left", "per_layer_input_gate"} < in_all and in_all.isdisjoint(SMALL_MATRICES)
    targets = ["altup_projections", "altup_unembed_projections/1", *SMALL_MATRICES, "linear_left"]
    paths = attach(loaded.module, targets, lora_factory(LoRASettings(r=2, alpha=4.0)), jax.random.key(0))
    assert sum(path.startswith("streams/") for path in paths) == 4
    for i, adapter in enumerate(adapters(loaded.module).values()):
        adapter.lora_b.set_value(0.3 * jax.random.normal(jax.random.key(i), adapter.lora_b.get_value().shape))
    peft_format.write_adapter(loaded.module, str(tmp_path), base=folder)
    named = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert {"altup_projections.0", "altup_unembed_projections.1", "correction_coefs"} < set(named)
    ours, base = loaded.logits(TOKENS), theirs(folder)
    with torch.no_grad():
        before = base(torch.tensor(TOKENS)).logits.numpy()
        after = peft.PeftModel.from_pretrained(base, str(tmp_path))(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(ours, after, rtol=0, atol=1e-5)


def test_the_text_part_of_a_model_that_takes_images_and_sound(folder, tmp_path):
    """Its files have keys for the last layers too, and tables for tokens of images and sound."""
    tensors = load_file(Path(folder) / "model.safetensors")
    nested = {name.replace("model.", "model.language_model.", 1): x for name, x in tensors.items()}
    nested |= {
        "model.language_model.layers.3.self_attn.k_proj.weight": np.ones((16, 32), np.float32),
        "model.vision_tower.timm_model.conv_stem.conv.weight": np.ones((4, 3), np.float32),
        "model.audio_tower.conformer.0.norm.weight": np.ones(4, np.float32),
        "model.embed_vision.embedding.weight": np.ones((8, 4), np.float32),
        "model.embed_audio.embedding.weight": np.ones((8, 4), np.float32),
    }
    save_file(nested, tmp_path / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": SMALL,
        "vision_config": {"model_type": "gemma3n_vision"}, "audio_config": {"model_type": "gemma3n_audio"},
        "audio_soft_tokens_per_image": 188, "vision_soft_tokens_per_image": 256, "boi_token_id": 255999,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path))
    assert any("1 tensors of 512 numbers are for keys and values" in note for note in loaded.notes), loaded.notes
    ours, alone = (flatten(nnx.state(model.module))[0] for model in (loaded, load_model(folder)))
    assert ours.keys() == alone.keys()
    for path in ours:
        np.testing.assert_array_equal(ours[path], alone[path], err_msg=path)
    attach(loaded.module, ["all-linear"], lora_factory(LoRASettings(r=2, alpha=4.0)), jax.random.key(0))
    peft_format.write_adapter(loaded.module, str(tmp_path), base="base", nested=True)
    targets = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    for name in ("altup_projections.2", "layers.0.laurel.linear_left", "layers.3.self_attn.q_proj"):
        assert re.fullmatch(targets, f"model.language_model.{name}"), name
    for name in ("language_model.layers.0", "language_model.layers.0.altup.modality_router", "audio_tower.layers.0"):
        assert not re.fullmatch(targets, f"model.{name}"), name


def test_both_dialects_say_the_same_and_the_rest_has_its_defaults():
    four = models.config_from_hf(SMALL | {"query_pre_attn_scalar": 256, "altup_lr_multiplier": 1.0})
    ropes = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in ((FULL, 100.0), (SLIDING, 50.0))}
    five = {name: x for name, x in SMALL.items() if not name.startswith("rope_")} | {"rope_parameters": ropes}
    assert four == models.config_from_hf(five)
    bare = models.config_from_hf({"model_type": "gemma3n_text", "num_hidden_layers": 35})
    assert bare.activation_sparsity_pattern == (0.95,) * 10 + (0.0,) * 25
    e4b = json.loads((ASSETS / "published" / "gemma-3n-e4b-text.json").read_text(encoding="utf-8"))
    assert bare == models.config_from_hf(e4b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers=4 of 4 layers"),
        ({"layer_types": [SLIDING] * 3 + [FULL]}, "no layer of type full_attention is before these"),
        ({"altup_num_inputs": 1}, "altup_num_inputs=1 with altup_active_idx=0: there are two streams or more"),
        ({"altup_active_idx": 4}, "altup_active_idx=4: there are two streams or more"),
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input=0: only layers with inputs of their own"),
        ({"vocab_size_per_layer_input": 97}, "vocab_size_per_layer_input=97 and vocab_size=96"),
        ({"intermediate_size": [48] * 3}, "intermediate_size has 3 numbers for num_hidden_layers=4"),
        ({"intermediate_size": [48] * 3 + [0]}, "intermediate_size=0 must be a whole number from 1"),
        ({"activation_sparsity_pattern": [0.5]}, "activation_sparsity_pattern has 1 numbers for num_hidden_layers=4"),
        ({"activation_sparsity_pattern": [1.0] * 4}, "a share is 0 or more and less than 1"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises(ModelError, match=message):
        models.config_from_hf(SMALL | fields)


def test_plans_count_the_streams():
    sizes = sizes_of(models.abstract_model(models.config_from_hf(SMALL)))
    assert sizes.streams == StreamGroup(count=4, width=32, layers=4, reached=4)
    # 4 x 4 factors of 32 numbers for the prediction and 4 for the correction, each a product and a sum; twice backward.
    assert sizes.stream_flops(10) == 10 * 3 * 4 * 2 * (16 + 4) * 32
    flops = sizes.model_flops(1, 16) - sizes.attention_flops(1, 16)
    assert flops == 6 * sizes.active * 16 + sizes.stream_flops(16)


def test_a_quantized_model_has_its_small_matrices_dense():
    wide = dict.fromkeys(("hidden_size", "intermediate_size", "laurel_rank", "hidden_size_per_layer_input"), 64)
    config = models.config_from_hf(SMALL | wide | {"head_dim": 16})
    model = models.abstract_model(config, quantization="nf4")
    for path, layer in linears(model):
        assert is_quantized(layer.kernel.get_value()) != (path.rsplit("/", 1)[-1] in SMALL_MATRICES), path


def test_the_share_that_becomes_zero_is_that_of_a_normal_distribution():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (100_000,))
    left = above_quantile(x, 0.95)
    assert float((left > 0).mean()) == pytest.approx(0.05, abs=0.002)
    largest = jnp.argsort(x)[-100:]
    np.testing.assert_allclose(x[largest] - left[largest], (x - left)[largest[0]], rtol=0, atol=1e-5)


def modules():
    """AltUp, LAuReL and the streams, and a function of each that takes their input and a key."""
    options = {"stddev": 0.2, "dtype": jnp.float32, "param_dtype": jnp.float32, "rngs": nnx.Rngs(params=1)}
    altup = AltUp(8, AltUpShape(streams=3), NormShape(eps=1e-6), **options)
    laurel, streams = Laurel(8, 4, NormShape(eps=1e-6), **options), Streams(8, 3, **options)
    return {
        "predict": (altup, lambda x, key: altup.predict(jnp.stack([x, x, 2 * x]), key)),
        "correct": (altup, lambda x, key: altup.correct(jnp.stack([x, x, 2 * x]), x + 1, key)),
        "laurel": (laurel, lambda x, key: laurel(x, x, key)),
        "expand": (streams, streams.expand),
        "combine": (streams, lambda x, key: streams.combine(jnp.stack([x, x, 2 * x]), key)),
    }


@pytest.mark.parametrize("name", modules())
def test_dropout_reaches_every_adapter(name):
    module, function = modules()[name]
    x, key = jax.random.normal(jax.random.key(0), (1, 2, 8)), jax.random.key(3)
    make = lora_factory(LoRASettings(r=2, alpha=4.0, dropout=0.5))
    reached = []
    for path, layer in linears(module):
        adapter = make(layer, key_of(key, path))
        adapter.lora_b.set_value(jnp.ones_like(adapter.lora_b.get_value()))
        set_adapter(layer, adapter)
        if np.abs(function(x, None) - function(x, key)).max() > 1e-4:
            reached.append(path)
        layer.adapter = nnx.data(None)
    expected = {
        "predict": ["modality_router", "prediction_coefs"], "correct": ["correction_coefs", "modality_router"],
        "laurel": ["linear_left", "linear_right"], "expand": [f"altup_projections/{n}" for n in range(2)],
        "combine": [f"altup_unembed_projections/{n}" for n in range(2)],
    }  # fmt: skip
    assert reached == expected[name]


@pytest.mark.parametrize("name", ["predict", "correct", "expand", "combine"])
def test_zeros_of_padding_have_a_gradient(name):
    """As embedded padding is zero in some models: the roots of its powers are not differentiable there."""
    _, function = modules()[name]
    gradient = jax.jit(jax.grad(lambda x: function(x, None).sum() + above_quantile(x, 0.9).sum()))
    assert np.isfinite(gradient(jnp.zeros((1, 2, 8)))).all()
