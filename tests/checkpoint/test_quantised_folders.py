"""Folders that other tools quantised: what is read is what their own readers compute."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxft import models
from jaxft.checkpoint import hf
from jaxft.checkpoint.folders.opening import folder_config, open_weights
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.quantized.float8 import Float8Matrix
from jaxft.conversion.convert import convert
from jaxft.errors import CheckpointError, ModelError
from jaxft.nn.quantized import kernels
from jaxft.quant import is_quantized

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
KEPT = "model.layers.1.mlp.down_proj"  # a module that is left dense
GROUP = 32


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """Those of a random model, float32."""
    from safetensors.numpy import load_file

    path = tmp_path_factory.mktemp("model")
    hf.write_weights(models.random_model(models.config_from_hf(CONFIG), seed=0), str(path))
    return {name: 5 * value for name, value in load_file(path / "model.safetensors").items()}


def modules(tensors):
    """The modules that tools quantise."""
    names = [name.removesuffix(".weight") for name in tensors if "_proj" in name]
    return [name for name in names if name != KEPT]


def save(folder, tensors, settings=None, base=CONFIG, **changes):
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    quantization = {} if settings is None else {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(base | quantization | changes))
    return str(folder)


def words(codes, axis):
    """Eight codes of four bits in a word of 32, the first in the lowest bits, along an axis; written out."""
    codes = np.moveaxis(codes, axis, -1).astype(np.uint32)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 8)])
    out = sum(codes[..., k::8] << np.uint32(4 * k) for k in range(8)).view(np.int32)
    return np.moveaxis(out, -1, axis)


def draw(shape, seed):
    """(codes [O, I], zeros [O, G], scales float16 [O, G], group of each input) of a matrix."""
    draws, groups = np.random.default_rng(seed), shape[1] // GROUP
    codes, zeros = draws.integers(0, 16, shape), draws.integers(1, 15, (shape[0], groups))
    scales = draws.uniform(0.01, 0.05, (shape[0], groups)).astype(np.float16)
    return codes, zeros, scales, np.arange(shape[1]) // GROUP


def values(codes, zeros, scales, groups):
    """(code - zero) * scale of every weight."""
    return ((codes - zeros[:, groups]) * scales.astype(np.float32)[:, groups]).astype(np.float32)


def gptq(tensors, *, v2=False, shuffled=False):
    packed, dense = dict(tensors), dict(tensors)
    for seed, module in enumerate(modules(tensors)):
        shape = packed.pop(f"{module}.weight").shape
        codes, zeros, scales, groups = draw(shape, seed)
        groups = np.random.default_rng(seed).permutation(groups) if shuffled else groups
        packed |= {
            f"{module}.qweight": words(codes.T, 0), f"{module}.qzeros": words((zeros - (0 if v2 else 1)).T, 1),
            f"{module}.scales": scales.T, f"{module}.g_idx": groups.astype(np.int32),
            f"{module}.bias": np.zeros(shape[0], np.float16),
        }  # fmt: skip
        dense[f"{module}.weight"] = values(codes, zeros, scales, groups)
    form = {"checkpoint_format": "gptq_v2"} if v2 else {}
    return packed, dense, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": shuffled} | form


def awq(tensors):
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    packed, dense = dict(tensors), dict(tensors)

    def interleaved(codes):
        return words(codes.reshape(len(codes), -1, 8)[:, :, order].reshape(codes.shape), 1)

    for seed, module in enumerate(modules(tensors)):
        codes, zeros, scales, groups = draw(packed.pop(f"{module}.weight").shape, seed)
        packed |= {
            f"{module}.qweight": interleaved(codes.T), f"{module}.qzeros": interleaved(zeros.T),
            f"{module}.scales": scales.T,
        }  # fmt: skip
        dense[f"{module}.weight"] = values(codes, zeros, scales, groups)
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
    return packed, dense, settings | {"modules_to_not_convert": [KEPT]}


def compressed(tensors, *, zeros=False, reordered=False):
    packed, dense = dict(tensors), dict(tensors)
    for seed, module in enumerate(modules(tensors)):
        name = f"{module}.weight"
        shape = packed.pop(name).shape
        codes, zero, scales, groups = draw(shape, seed)
        groups = np.random.default_rng(seed).permutation(groups) if reordered else groups
        zero = zero if zeros else np.full_like(zero, 8)
        packed |= {
            f"{name}_packed": words(codes, 1), f"{name}_scale": scales, f"{name}_shape": np.array(shape, np.int64),
            **({f"{name}_zero_point": words(zero, 0)} if zeros else {}),
            **({f"{name}_g_idx": groups.astype(np.int32)} if reordered else {}),
        }  # fmt: skip
        dense[name] = values(codes, zero, scales, groups)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": not zeros}
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    settings = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    return packed, dense, settings | {"ignore": [KEPT, "lm_head"]}


BLOCKS = {"block": (32, 32), "ragged": (48, 48), "mx": (1, 32)}


def float8(tensors, kind):
    packed, dense = dict(tensors), dict(tensors)
    for module in modules(tensors):
        name = f"{module}.weight"
        whole = packed[name]
        rows, columns = whole.shape
        block = BLOCKS.get(kind) or {"tensor": whole.shape, "channel": (1, columns)}[kind]
        grid = (-(-rows // block[0]), -(-columns // block[1]))
        scales = np.random.default_rng(0).uniform(0.001, 0.01, grid).astype(np.float32)
        exponents = np.random.default_rng(0).integers(115, 122, grid).astype(np.uint8)
        scales = np.exp2(exponents.astype(np.float32) - 127) if kind == "mx" else scales
        spread = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[:rows, :columns]
        packed[name] = (whole / spread).astype(E4M3)
        dense[name] = packed[name].astype(np.float32) * spread
        if kind == "channel":
            packed |= {f"{name}_scale": scales.astype(ml_dtypes.bfloat16)}
            packed |= {f"{module}.input_scale": np.ones(1, np.float32)}
            dense[name] = packed[name].astype(np.float32) * packed[f"{name}_scale"].astype(np.float32)
        else:
            stored = exponents if kind == "mx" else scales.reshape(()) if kind == "tensor" else scales
            packed |= {f"{name}_scale_inv": stored}
            packed |= {f"{module}.activation_scale": np.ones((), np.float32)} if kind == "tensor" else {}
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "modules_to_not_convert": [KEPT, "lm_head"]}
    settings |= {"weight_block_size": list(block) if kind in BLOCKS else None}
    if kind == "channel":
        settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}
    return packed, dense, settings


FORMS = {
    "gptq": gptq,
    "gptq-v2": lambda t: gptq(t, v2=True),
    "gptq-reordered": lambda t: gptq(t, shuffled=True),
    "awq": awq,
    "packed": compressed,
    "packed-zeros": lambda t: compressed(t, zeros=True),
    "packed-reordered": lambda t: compressed(t, reordered=True),
    **{f"float8-{kind}": lambda t, kind=kind: float8(t, kind) for kind in (*BLOCKS, "tensor", "channel")},
}


@pytest.mark.parametrize("form", FORMS)
def test_matrices_are_the_formula_of_their_form_in_any_block(tensors, tmp_path, form):
    packed, dense, settings = FORMS[form](tensors)
    hf_config, source, _ = open_weights(save(tmp_path / "packed", packed, settings))
    assert "quantization_config" not in hf_config
    specs, draws = source.specs(), np.random.default_rng(0)
    assert {name: spec.shape for name, spec in specs.items()} == {name: value.shape for name, value in dense.items()}
    for name, value in dense.items():
        np.testing.assert_allclose(source.read(name), value, rtol=1e-6, err_msg=name)
        cuts = [sorted(draws.integers(0, size + 1, 2)) for size in value.shape]
        index = tuple(slice(*map(int, cut)) for cut in cuts)
        np.testing.assert_allclose(source.read(name, index), value[index], rtol=1e-6, err_msg=name)


def test_the_order_of_codes_in_a_word(tmp_path):
    """Words written out by hand, so that a fault of the test's own packing would show."""
    from jaxft.checkpoint.quantized.integers import AWQMatrix
    from jaxft.checkpoint.quantized.matrices import unpack_first, unpack_last

    np.testing.assert_array_equal(unpack_last(np.array([0x76543210], np.int32), 4), np.arange(8))
    np.testing.assert_array_equal(unpack_first(np.array([[0x76543210]], np.int32), 4)[:, 0], np.arange(8))
    np.testing.assert_array_equal(AWQMatrix._unpack(np.array([[0x75316420]], np.int32))[0], np.arange(8))
    assert unpack_last(np.array([-1], np.int32), 4).tolist() == [15] * 8  # the highest bit is no sign


@pytest.mark.parametrize("kind", ["block", "tensor"])
def test_float8_folders_have_the_logits_of_transformers(tensors, tmp_path, kind):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    packed, _, settings = float8(tensors, kind)
    settings |= {} if kind == "block" else {"activation_scheme": "static"}
    folder = save(tmp_path / "packed", packed, settings, torch_dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(torch.from_numpy(TOKENS)).logits.numpy()
    logits = load_model(folder).logits(TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


DEEPSEEK = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 40, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "kv_lora_rank": 24, "q_lora_rank": 20, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def test_float8_folders_of_deepseek_are_read_without_the_layers_that_predict_more(tmp_path):
    """In blocks that divide no matrix, as those of 128 do not divide its 576 rows of keys and values."""
    from safetensors.numpy import load_file

    hf.write_weights(models.random_model(models.config_from_hf(DEEPSEEK), seed=0), str(tmp_path))
    drawn = {name: 5 * value for name, value in load_file(tmp_path / "model.safetensors").items()}
    packed, dense, settings = float8(
        drawn | {"model.layers.2.eh_proj.weight": np.ones((64, 128), np.float32)}, "ragged"
    )
    dense = {name: value for name, value in dense.items() if ".layers.2." not in name}
    expected = load_model(save(tmp_path / "dense", dense, base=DEEPSEEK))
    read = load_model(save(tmp_path / "packed", packed, settings, base=DEEPSEEK))
    np.testing.assert_array_equal(read.logits(TOKENS), expected.logits(TOKENS))
    assert "2 tensors of" in read.notes[0] and "predict several tokens at once" in read.notes[0]


def test_blocks_are_those_of_the_config_even_where_they_also_divide_evenly():
    from jaxft.checkpoint.quantized.float8 import find_float8
    from jaxft.checkpoint.tensors import TensorSpec

    float32 = np.dtype(np.float32)
    specs = {"w": TensorSpec((192, 128), E4M3), "w_scale_inv": TensorSpec((2, 1), float32)}
    # 128 rows and then 64, not twice 96.
    assert find_float8(specs, (128, 128))[0]["w"] == Float8Matrix("w", "w_scale_inv", (192, 128), (128, 128))


@pytest.mark.parametrize("form", ["awq", "float8-block"])
def test_what_the_files_keep_dense_stays_dense_when_the_rest_is_quantised_again(tensors, tmp_path, form):
    packed, dense, settings = FORMS[form](tensors)
    folder = save(tmp_path / "packed", packed, settings)
    assert f"{KEPT}.weight" in folder_config(folder)["dense_tensors"]
    ours = load_model(folder, quantization="nf4-dq").module
    left = [path for path, layer in kernels(ours).items() if not is_quantized(layer.kernel.get_value())]
    assert left == ["layers/1/mlp/down_proj"]
    np.testing.assert_array_equal(ours.layers[1].mlp.down_proj.kernel.get_value()[0], dense[f"{KEPT}.weight"].T)


def test_a_conversion_writes_the_dense_model(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.conversion.targets.LOGITS_LIMIT", 0)
    packed, dense, settings = gptq(tensors)
    convert(save(tmp_path / "packed", packed, settings), str(tmp_path / "dense"))
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert not {"quantization_config", "dense_tensors"} & set(config)
    source = open_weights(str(tmp_path / "dense"))[1]
    for name, value in dense.items():
        np.testing.assert_allclose(source.read(name), value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 3}, "GPTQ with 3 bits in the form 'gptq' is not read"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "in the form 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ with 4 bits in the form 'gemv'"),
        ({"quant_method": "hqq"}, "the form 'hqq' .*is not read"),
        ({"quant_method": "torchao"}, "the form 'torchao' .*is not read"),
        ({"group_size": 64, "bits": 4}, "the form MLX .*is not read"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "'nvfp4-pack-quantized'",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "as int8, and only nf4"),
        ("4bit", "is not an object"),
        ({"quant_method": ["fp8"]}, r"quant_method=\['fp8'\] must be a text"),
        ({"quant_method": "compressed-tensors", "config_groups": [1]}, "config_groups=.* must be an object of objects"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": [8]}}},
            r"a in quantization_config of config.json: weights=\[8\] must be an object",
        ),
        (
            {"quant_method": "fp8", "weight_block_size": ["a", "b"]},
            "weight_block_size=.* must be two numbers above zero",
        ),
    ],
)
def test_other_forms_are_refused_with_the_model_to_take(tensors, tmp_path, settings, said):
    folder = save(tmp_path / "Tiny-3-8B-Instruct-AWQ", tensors, settings)
    for read in (load_model, folder_config):
        with pytest.raises(ModelError, match=said) as refusal:
            read(folder)
    if "must be" not in said:
        assert "probably called Tiny-3-8B-Instruct, and quantise it while it is loaded" in str(refusal.value)


def test_codes_and_settings_belong_together(tensors, tmp_path):
    packed, _, settings = gptq(tensors)
    with pytest.raises(CheckpointError, match="belong to quantised matrices, but config.json has no quantiz"):
        load_model(save(tmp_path / "no-settings", packed))
    with pytest.raises(CheckpointError, match=r"are quantised \(gptq\), but no tensor is: remove its"):
        load_model(save(tmp_path / "no-codes", tensors, settings))
    module = modules(tensors)[0]
    without = {name: value for name, value in packed.items() if name != f"{module}.scales"}
    with pytest.raises(CheckpointError, match="without scales"):
        load_model(save(tmp_path / "no-scales", without, settings))
    wrong = packed | {f"{module}.qzeros": np.full_like(packed[f"{module}.qzeros"], -1)}
    with pytest.raises(CheckpointError, match="zeros of 15, which readers of GPTQ's first form take for different"):
        load_model(save(tmp_path / "zeros", wrong, settings))
    packed, _, settings = float8(tensors, "block")
    without = {name: value for name, value in packed.items() if name != f"{module}.weight_scale_inv"}
    with pytest.raises(CheckpointError, match="is float8_e4m3fn without a scale"):
        load_model(save(tmp_path / "no-scale", without, settings))
    wrong = packed | {f"{module}.weight_scale_inv": np.ones((3, 5), np.float32)}
    with pytest.raises(CheckpointError, match=r"has scales \[3, 5\], which are neither one"):
        load_model(save(tmp_path / "scales", wrong, settings))
