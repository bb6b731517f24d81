"""GGUF written here: read back by us and by the library, for every family, type and rope; and refusals."""

import json

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from jaxft import models
from jaxft.checkpoint import gguf_write, peft
from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.gguf_names import interleave
from jaxft.checkpoint.gguf_write import KINDS, check_gguf, model_metadata, write_gguf, write_gguf_adapter
from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.errors import ExportError, ModelError

SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "rope_theta": 5e5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": {"model_type": "llama"},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama_biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama_llama3": {"model_type": "llama", "rope_scaling": LLAMA3},
    "llama_linear": {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3"},
}


def made(name: str):
    """(config.json, tensors) of a random model."""
    config = SIZES | CONFIGS[name]
    if config["model_type"] not in models.families():
        pytest.skip(f"{config['model_type']} is not a family here")
    if config["model_type"] == "qwen2":
        config = {k: v for k, v in config.items() if k != "head_dim"}
    tensors = {
        k: (spec, f())
        for k, (spec, f) in hf_tensors(models.random_model(models.config_from_hf(config), seed=0)).items()
    }
    rng = np.random.default_rng(0)
    # Norms and biases start as ones and zeros, in which a mix-up would not show.
    arrays = {k: rng.normal(size=a.shape).astype(np.float32) if a.ndim == 1 else a for k, (_, a) in tensors.items()}
    return config, {k: (TensorSpec(a.shape, a.dtype), lambda a=a: a) for k, a in arrays.items()}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", KINDS)
def test_what_is_written_reads_back_as_the_library_quantises_it(tmp_path, name, dtype):
    config, tensors = made(name)
    path = str(tmp_path / "model.gguf")
    write_gguf(path, config, tensors, dtype=dtype, tokenizer={"tokenizer.ggml.eos_token_id": 2}, name="a name")
    source, kind = GGUFFile(path), KINDS[dtype]
    assert set(source.specs()) == set(tensors)
    for hf, (_, make) in tensors.items():
        wanted = make() if make().ndim == 1 or dtype == "float32" else dequantize(quantize(make(), kind), kind)
        np.testing.assert_array_equal(source.read(hf), wanted, err_msg=hf)
    check_gguf(path, tensors, dtype=dtype)
    ours, back = models.config_from_hf(config), models.config_from_hf(source.hf_config())
    for field in SIZES:
        if field != "rope_theta":
            assert getattr(back, field) == getattr(ours, field), field
    np.testing.assert_allclose(back.rope.frequencies(32), ours.rope.frequencies(32), rtol=1e-6)


def test_the_library_reads_the_same_names_and_rows(tmp_path):
    config, tensors = made("llama")
    path = str(tmp_path / "model.gguf")
    write_gguf(path, config, tensors, dtype="float32", tokenizer={}, name="x")
    found = {t.name: t for t in gguf.GGUFReader(path).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert set(found) == {f"{names.get_name(hf.removesuffix('.weight'))}.weight" for hf in tensors}
    q = tensors["model.layers.1.self_attn.q_proj.weight"][1]()
    np.testing.assert_array_equal(found["blk.1.attn_q.weight"].data, interleave(q, 4))
    # Source of the order: llama.cpp's converter, LlamaModel.permute.
    expected = q.reshape(4, 2, 16, 64).swapaxes(1, 2).reshape(q.shape)
    np.testing.assert_array_equal(interleave(q, 4), expected)


def test_rows_that_do_not_fill_blocks_fall_back_to_float16(tmp_path):
    config, tensors = made("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    config = config | {"intermediate_size": 80}
    for hf, (spec, make) in list(tensors.items()):
        if "mlp" in hf:
            array = make()[:, :80] if "down" in hf else make()[:80]
            tensors[hf] = (TensorSpec(array.shape, spec.dtype), lambda array=array: array)
    path = str(tmp_path / "model.gguf")
    write_gguf(path, config, tensors, dtype="q8_0", tokenizer={}, name="x")
    check_gguf(path, tensors, dtype="q8_0")
    np.testing.assert_array_equal(GGUFFile(path).read(name), tensors[name][1]().astype(np.float16).astype(np.float32))


def test_a_damaged_value_is_noticed(tmp_path):
    config, tensors = made("llama")
    path = tmp_path / "model.gguf"
    write_gguf(str(path), config, tensors, dtype="float32", tokenizer={}, name="x")
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ExportError, match=r"reads back differently"):
        check_gguf(str(path), tensors, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model_type": "mistral", "sliding_window": 100}, r"sliding_window=100 is below max_position_embeddings=512"),
        ({"model_type": "olmo2"}, r"model_type 'olmo2' is not written to GGUF"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
            r"rope scaling 'yarn'",
        ),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(changes, match):
    with pytest.raises((ExportError, ModelError), match=match):
        model_metadata(SIZES | {"model_type": "llama"} | changes)


def test_values_and_types_that_do_not_fit_are_refused(tmp_path):
    config, tensors = made("llama")
    path = str(tmp_path / "model.gguf")
    with pytest.raises(ExportError, match=r"not 'q4_0'"):
        write_gguf(path, config, tensors, dtype="q4_0", tokenizer={}, name="x")
    huge = tensors["lm_head.weight"][1]() * 1e8
    tensors["lm_head.weight"] = (TensorSpec(huge.shape, huge.dtype), lambda: huge)
    with pytest.raises(ExportError, match=r"'lm_head\.weight' has values up to .* float16 ends at 65504"):
        write_gguf(path, config, tensors, dtype="float16", tokenizer={}, name="x")
    tensors["model.extra.weight"] = tensors["lm_head.weight"]
    with pytest.raises(ExportError, match=r"no name in GGUF's llama, among them \['model\.extra\.weight'\]"):
        write_gguf(path, config, tensors, dtype="float32", tokenizer={}, name="x")


def write_lora(folder, module="model.layers.1.self_attn.k_proj", outputs=64, **settings):
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((4, 64), (outputs, 4)))
    key = f"{peft.PREFIX}{module}"
    save_file({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, folder / peft.WEIGHTS)
    (folder / peft.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings))
    return a, b


@pytest.mark.parametrize(("settings", "alpha"), [({}, 8.0), ({"use_rslora": True}, 16.0)])
def test_an_adapter_has_llama_cpps_names_rows_and_scale(tmp_path, settings, alpha):
    a, b = write_lora(tmp_path, **settings)
    path = str(tmp_path / "lora.gguf")
    write_gguf_adapter(path, str(tmp_path), SIZES | CONFIGS["llama"])
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == alpha
    found = {t.name: t.data for t in reader.tensors}
    assert set(found) == {"blk.1.attn_k.weight.lora_a", "blk.1.attn_k.weight.lora_b"}
    np.testing.assert_array_equal(found["blk.1.attn_k.weight.lora_a"], a)
    np.testing.assert_array_equal(found["blk.1.attn_k.weight.lora_b"], interleave(b, 2))


def test_an_adapter_without_a_place_or_in_blocks_is_refused(tmp_path):
    write_lora(tmp_path, module="model.layers.9.self_attn.k_proj")
    with pytest.raises(ExportError, match=r"tensors that GGUF has no place for.*layers\.9"):
        write_gguf_adapter(str(tmp_path / "x.gguf"), str(tmp_path), SIZES | CONFIGS["llama"])
    with pytest.raises(ExportError, match=r"do not fill blocks of q8_0"):
        write_gguf_adapter(str(tmp_path / "x.gguf"), str(tmp_path), SIZES | CONFIGS["llama"], dtype="q8_0")


def test_one_tensor_at_a_time_is_in_memory(tmp_path, monkeypatch):
    config, tensors = made("llama")
    alive = []

    def make(array):
        alive.append(1)
        assert len(alive) == 1
        return array

    write_data = gguf.GGUFWriter.write_tensor_data

    def counted(self, array):
        write_data(self, array)
        alive.clear()

    monkeypatch.setattr(gguf_write.GGUFWriter, "write_tensor_data", counted)
    lazy = {k: (spec, lambda f=f: make(f())) for k, (spec, f) in tensors.items()}
    write_gguf(str(tmp_path / "m.gguf"), config, lazy, dtype="float32", tokenizer={}, name="x")
