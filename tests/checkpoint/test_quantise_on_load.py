"""Quantised while loading: what quantising the loaded model gives, on one device and on eight, in little memory."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.checkpoint import hf
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.quantized import on_load as quantize_on_load
from jaxft.config import MeshConfig
from jaxft.errors import CheckpointError, ModelError
from jaxft.nn.quantized import has_quantized_kernels, kernels, quantize
from jaxft.nn.storage import storage_dims_of
from jaxft.quant import FORMATS, dense, is_quantized
from jaxft.quant.nibbles import unpack
from jaxft.quant.scales import dense_scales
from jaxft.sharding.mesh import make_mesh_plan

SIZES = {
    "vocab_size": 96, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": {"model_type": "llama", "rms_norm_eps": 1e-5},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5},
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(family, dtype) -> a Hugging Face folder of random weights."""

    @functools.cache
    def make(family="llama", dtype="float32"):
        path = tmp_path_factory.mktemp(family)
        config = models.config_from_hf(SIZES | FAMILIES[family])
        hf.write_weights(models.random_model(config, seed=0), str(path), dtype=dtype)
        hf.write_config(str(path), SIZES | FAMILIES[family], dtype=dtype)
        return str(path)

    return make


def assert_same_kernels(found, expected):
    for (path, a), b in zip(kernels(found).items(), kernels(expected).values(), strict=True):
        a, b = a.kernel.get_value(), b.kernel.get_value()
        assert jax.tree.structure(a) == jax.tree.structure(b)
        if hasattr(a, "codes"):
            np.testing.assert_array_equal(np.asarray(a.codes), np.asarray(b.codes), err_msg=path)
        # The mean of all scales of a layer is a sum, whose last bit depends on where its parts lie.
        np.testing.assert_allclose(dense(a, np.float32), dense(b, np.float32), rtol=3e-7, atol=1e-9, err_msg=path)


# nf4-dq is nf4 and more.
@pytest.mark.parametrize("format", [pytest.param("nf4", marks=pytest.mark.slow), *sorted(set(FORMATS) - {"nf4"})])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_quantising_the_loaded_model_gives(folder, family, format):
    loaded = load_model(folder(family, "bfloat16"), quantization=format)
    assert loaded.quantization == format
    expected = load_model(folder(family, "bfloat16")).module
    quantize(expected, FORMATS[format])
    assert_same_kernels(loaded.module, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_devices_hold_what_one_holds(folder, family):
    axes = {"fsdp": 2, "tensor": 2} | ({"expert": 2} if family == "mixtral" else {"data": 2})
    mesh = make_mesh_plan(MeshConfig(**axes))
    spread = load_model(folder(family), quantization="nf4-dq", mesh=mesh).module
    assert_same_kernels(spread, load_model(folder(family), quantization="nf4-dq").module)
    lies = jax.tree.map(lambda leaf: leaf.sharding, nnx.state(spread))
    assert lies == mesh.shardings(nnx.state(spread), storage_dims_of(spread))


def test_no_more_than_one_dense_layer_is_held(folder, monkeypatch):
    """Every dense array that loading makes of a stack is one layer of it."""
    sizes, store = [], quantize_on_load._store

    def watched(keep, found, *rest):
        sizes.append(found.shape)
        return store(keep, found, *rest)

    monkeypatch.setattr(quantize_on_load, "_store", watched)
    load_model(folder(), quantization="nf4")
    assert len(sizes) == 3 * 7
    assert {shape for shape in sizes if len(shape) != 2} == set()


def test_generation_and_export_take_quantised_state(folder, tmp_path):
    """Logits of what is exported from a quantised model are its own: the dense values are written."""
    loaded = load_model(folder(), quantization="nf4-dq")
    hf.write_weights(loaded.module, str(tmp_path))
    hf.write_config(str(tmp_path), SIZES | FAMILIES["llama"], dtype="float32")
    again = load_model(str(tmp_path))
    assert has_quantized_kernels(loaded.module) and not has_quantized_kernels(again.module)
    np.testing.assert_allclose(again.logits(TOKENS), loaded.logits(TOKENS), atol=2e-6)


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory, request):
    """packed(double, skip, storage) -> a folder that transformers saved after bitsandbytes quantised it, and its model.

    skip: modules that stay dense. storage: torch's name of the type whose elements hold the codes.
    """
    torch = pytest.importorskip("torch")
    pytest.importorskip("bitsandbytes")
    transformers = pytest.importorskip("transformers")
    # On CPUs with AVX512-BF16 bitsandbytes would multiply in bfloat16, whatever type the model computes in.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    request.addfinalizer(monkeypatch.undo)

    @functools.cache
    def make(double, skip=(), storage="uint8"):
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=list(skip) or None,
            bnb_4bit_quant_storage=getattr(torch, storage),
        )  # fmt: skip
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder(), quantization_config=settings, dtype=torch.float32, attn_implementation="eager"
        )
        path = str(tmp_path_factory.mktemp(f"packed-{double}"))
        model.save_pretrained(path)
        return path, model.eval()

    return make


def theirs(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("format", [None, "nf4", "nf4-dq"])
def test_a_folder_of_bitsandbytes_gives_its_logits(packed, double, format):
    path, model = packed(double)
    logits = load_model(path, quantization=format).logits(TOKENS)
    if format != "nf4-dq" or double:
        np.testing.assert_allclose(logits, theirs(model), atol=1e-5 * np.abs(logits).max())
    else:
        # Scales that the file has whole are compressed here: another model, by a little.
        assert 0 < np.abs(logits - theirs(model)).max() < 0.05 * np.abs(logits).max()


@pytest.mark.parametrize("format", ["nf4-dq", "int8"])
def test_what_the_folder_keeps_dense_stays_dense(packed, format):
    skipped = ("lm_head", "model.layers.1.mlp", "model.layers.0.self_attn.q_proj")
    path, model = packed(True, skipped)
    loaded = load_model(path, quantization=format)
    dense_paths = [path for path, layer in kernels(loaded.module).items() if not is_quantized(layer.kernel.get_value())]
    assert dense_paths == [
        "layers/0/self_attn/q_proj",
        *(f"layers/1/mlp/{name}_proj" for name in ("down", "gate", "up")),
    ]
    if format == "nf4-dq":
        logits = loaded.logits(TOKENS)
        np.testing.assert_allclose(logits, theirs(model), atol=1e-5 * np.abs(logits).max())


def test_the_type_that_stores_the_codes_changes_nothing(packed):
    same = load_model(packed(True)[0]).module
    for storage in ("bfloat16", "float32"):
        path, _ = packed(True, storage=storage)
        assert_same_kernels(load_model(path).module, same)


@pytest.mark.parametrize("double", [False, True])
def test_codes_come_as_they_are(packed, double, folder):
    path, model = packed(double)
    mesh = make_mesh_plan(MeshConfig(fsdp=2, tensor=2, data=2))
    format = "nf4-dq" if double else "nf4"
    for loaded in (load_model(path, quantization=format), load_model(path, quantization=format, mesh=mesh)):
        for layer in range(3):
            ours = loaded.module.layers[0].mlp.down_proj.kernel.get_value()[layer]
            weight = model.model.layers[layer].mlp.down_proj.weight
            flat = weight.data.numpy().ravel()
            codes = np.stack([flat >> 4, flat & 15], axis=-1).reshape(ours.shape[::-1]).T
            np.testing.assert_array_equal(np.asarray(unpack(ours.codes)).reshape(codes.shape), codes)
            if not double:
                np.testing.assert_array_equal(np.asarray(ours.scales).T.ravel(), weight.quant_state.absmax.numpy())
                continue
            state = weight.quant_state
            np.testing.assert_array_equal(np.asarray(ours.scales.codes).T.ravel(), state.absmax.numpy())
            np.testing.assert_array_equal(np.asarray(ours.scales.largest), state.state2.absmax.numpy())
            assert np.float32(ours.scales.mean) == np.float32(state.offset.item())
    # And a model quantised here has the very codes that they would have written.
    here = load_model(folder(), quantization="nf4").module.layers[0].mlp.down_proj.kernel.get_value()
    there = load_model(path, quantization="nf4").module.layers[0].mlp.down_proj.kernel.get_value()
    np.testing.assert_array_equal(np.asarray(here.codes), np.asarray(there.codes))
    np.testing.assert_allclose(dense_scales(here.scales), dense_scales(there.scales), rtol=1e-2 if double else 0)


def edited(packed, tmp_path, change):
    """A copy of a double-quantised folder with its tensors changed."""
    import shutil

    from safetensors.numpy import load_file, save_file

    path = tmp_path / "edited"
    shutil.copytree(packed(True)[0], path)
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return str(path)


NAME = "model.layers.1.mlp.up_proj.weight"
STATE = NAME + ".quant_state.bitsandbytes__nf4"


def with_state(tensors, **changes):
    state = json.loads(tensors[STATE].tobytes()) | changes
    tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(NAME + ".absmax"), r"up_proj.weight.absmax is missing, not \[512\] uint8"),
        (lambda t: t.pop(NAME + ".nested_absmax"), r"nested_absmax is missing, not \[2\] float32"),
        (lambda t: with_state(t, blocksize=128), "blocks of 128 weights and 256 scales"),
        (lambda t: with_state(t, shape=[256, 100]), "whose rows divide by 64"),
        (lambda t: t.update({STATE: np.frombuffer(b"{not json", np.uint8)}), "is not valid JSON"),
        (lambda t: t.update({NAME: t[NAME][:-1]}), r"up_proj.weight is \[16383, 1\] uint8, not \[16384, 1\] uint8"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(packed, tmp_path, change, said):
    with pytest.raises(CheckpointError, match=said):
        load_model(edited(packed, tmp_path, change), quantization="nf4-dq")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "as int8, and only nf4"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "as fp4, and only nf4"),
    ],
)
def test_other_ways_of_bitsandbytes_are_refused(folder, tmp_path, config, said):
    hf.write_config(str(tmp_path), SIZES | FAMILIES["llama"], dtype="float32")
    given = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(given | {"quantization_config": config}))
    with pytest.raises(ModelError, match=said):
        load_model(str(tmp_path))
