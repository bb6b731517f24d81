"""GGUF files: tensors and config against what was put in, against transformers, and every refusal."""

import math
import os
import struct

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize

from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.gguf.header import read_header

HIDDEN, INNER, VOCAB, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 32, 4, 2, 16, 2
F32, F16, Q8_0, Q4_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0"))


def hf_tensors(arch="llama", tied=False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for n in range(LAYERS):
        layer = {
            "input_layernorm.weight": (HIDDEN,),
            "self_attn.q_proj.weight": (q, HIDDEN),
            "self_attn.k_proj.weight": (kv, HIDDEN),
            "self_attn.v_proj.weight": (kv, HIDDEN),
            "self_attn.o_proj.weight": (HIDDEN, q),
            "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.gate_proj.weight": (INNER, HIDDEN),
            "mlp.up_proj.weight": (INNER, HIDDEN),
            "mlp.down_proj.weight": (HIDDEN, INNER),
        }
        if arch == "qwen2":
            layer |= {f"self_attn.{p}_proj.bias": (q if p == "q" else kv,) for p in "qkv"}
        if arch == "qwen3":
            layer |= {f"self_attn.{p}_norm.weight": (HEAD_DIM,) for p in "qk"}
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def interleave(array: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to q and k: (half, pair) -> (pair, half) in every head."""
    halves = array.reshape(heads, 2, HEAD_DIM // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def kind_of(name: str):
    """A different type for different tensors; vectors stay float32 as in real files."""
    if "norm" in name or name.endswith(".bias"):
        return F32
    return Q8_0 if "q_proj" in name else Q4_0 if "k_proj" in name else F16 if "mlp" in name else F32


def settings(arch="llama"):
    return {
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": HIDDEN,
        f"{arch}.feed_forward_length": INNER,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 5e5,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write(path, arch="llama", hf=None, extra=(), drop=(), raw=()) -> dict[str, np.ndarray]:
    """Writes a GGUF; returns the tensors that should be read. extra, raw: metadata and tensors to add."""
    hf = hf_tensors(arch) if hf is None else hf
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], LAYERS)
    writer, expected = gguf.GGUFWriter(path, arch), {}
    for key, value in (settings(arch) | dict(extra)).items():
        if value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    for name, array in hf.items():
        kind = kind_of(name)
        expected[name] = dequantize(quantize(array, kind), kind)
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleave(array, HEADS if "q_proj" in name else KV_HEADS)
        base, _, suffix = name.rpartition(".")
        ours = f"{names.get_name(base)}.{suffix}"
        if ours not in drop:
            writer.add_tensor(ours, quantize(array, kind), raw_dtype=kind)
    for name, array in dict(raw).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "model.gguf")


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_every_tensor_comes_back_under_its_hugging_face_name(path, arch):
    expected = write(path, arch)
    source = GGUFFile(path)
    assert source.specs() == {name: TensorSpec(a.shape, np.dtype(np.float32)) for name, a in expected.items()}
    for name, array in expected.items():
        np.testing.assert_array_equal(source.read(name), array)


@pytest.mark.parametrize(
    "index", [(slice(3, 21),), (slice(None), slice(5, 40)), (slice(7, 8), slice(0, 1)), (slice(4, 4),)]
)
def test_blocks_equal_slices(path, index):
    expected = write(path)
    source = GGUFFile(path)
    for name in ("model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"):
        np.testing.assert_array_equal(source.read(name, index), expected[name][index])
    np.testing.assert_array_equal(source.read("model.norm.weight", (slice(3, 9),)), expected["model.norm.weight"][3:9])


def test_only_the_rows_of_a_block_are_read(path, monkeypatch):
    write(path)
    source, read, preadv = GGUFFile(path), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: read.append(sum(map(len, b))) or preadv(fd, b, at))
    source.read("model.layers.0.mlp.up_proj.weight", (slice(2, 5),))
    source.read("model.layers.0.self_attn.q_proj.weight", (slice(0, HEAD_DIM),))
    assert read == [3 * HIDDEN * 2, HEAD_DIM * HIDDEN // 32 * 34]


def test_config(path):
    write(path)
    assert GGUFFile(path).hf_config() == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    write(path, hf=hf_tensors(tied=True))
    assert GGUFFile(path).hf_config()["tie_word_embeddings"] is True


def test_rope_scaling(path):
    write(path, extra={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0})
    assert GGUFFile(path).hf_config()["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    with_context = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 99}
    write(path, extra={f"llama.{key}": value for key, value in with_context.items()})
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 99}
    assert GGUFFile(path).hf_config()["rope_scaling"] == expected
    write(path, extra={"llama.rope.scaling.type": "longrope"})
    with pytest.raises(ModelError, match="'longrope' is not one of none, linear, yarn"):
        GGUFFile(path)


def test_every_token_that_ends_an_answer_is_a_stop_token(path):
    write(path)
    assert GGUFFile(path).generation_config() == {"eos_token_id": 2}
    write(path, extra={"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 2})
    assert GGUFFile(path).generation_config() == {"eos_token_id": [2, 7]}
    write(path, extra={"tokenizer.ggml.eos_token_id": None})
    assert GGUFFile(path).generation_config() is None


def llama3_factors(factor=8.0, low=1.0, high=4.0, context=8192):
    """Written out as in the published rule: by wavelength, in three ranges."""
    factors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * 5e5 ** (2 * i / HEAD_DIM)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_factors_are_turned_back_into_settings(path):
    write(path, raw={"rope_freqs.weight": llama3_factors(32.0)})
    source = GGUFFile(path)
    assert source.hf_config()["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert "rope_freqs.weight" not in source.specs()
    write(path, raw={"rope_freqs.weight": llama3_factors(context=512)})
    with pytest.raises(ModelError, match=r"rotary factors in rope_freqs\.weight are not Llama 3.1's for factor 8\.0"):
        GGUFFile(path)
    write(path, raw={"rope_freqs.weight": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight has shape \(3,\)"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"arch": "falcon", "hf": {}}, ModelError, "architecture 'falcon' is not supported; supported: apertus"),
        ({"extra": {"llama.expert_count": 8}}, CheckpointError, "no metadata 'llama.expert_used_count'"),
        ({"extra": {"llama.residual_scale": 2.5}}, ModelError, "llama.residual_scale=2.5 is not"),
        ({"extra": {"llama.attention.causal": False}}, ModelError, "llama.attention.causal=False is not"),
        ({"extra": {"llama.some_new_setting": 0}}, ModelError, "llama.some_new_setting=0 is not"),
        ({"extra": {"llama.attention.sliding_window": 9}}, ModelError, "llama.attention.sliding_window=9 is not"),
        ({"extra": {"llama.attention.scale": 0.1}}, ModelError, "llama.attention.scale=0.1.* is not implemented"),
        ({"extra": {"llama.attention.head_count_kv": [2, 1]}}, ModelError, "one whole number for all layers"),
        ({"extra": {"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}}, ModelError, "count=8"),
        ({"extra": {"llama.context_length": None}}, CheckpointError, "no metadata 'llama.context_length'"),
        ({"extra": {"llama.block_count": 1}}, ModelError, "'blk.1.*has no place in a llama model of 1 layers"),
        ({"extra": {"llama.block_count": 3}}, CheckpointError, "9 tensors are missing: blk.2.attn_norm"),
        ({"drop": ["token_embd.weight"]}, CheckpointError, "'token_embd.weight' is missing"),
        ({"raw": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, ModelError, "attn_sinks.weight' has no place"),
        ({"extra": {"llama.feed_forward_length": 95}}, CheckpointError, r"has shape \(96, 64\), not \(95, 64\)"),
        ({"raw": {"blk.0.attn_q.bias": np.ones(64)}}, ModelError, "'blk.0.attn_q.bias' has the type F64"),
    ],
)  # fmt: skip
def test_refuses_what_it_does_not_understand(path, change, error, match):
    write(path, **change)
    with pytest.raises(error, match=match):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("extra", "must_be"),
    [
        ({"llama.rope.freq_base": "1e4"}, "llama.rope.freq_base='1e4' must be a finite number above zero"),
        ({"llama.rope.scaling.type": 3}, "llama.rope.scaling.type=3 must be a text"),
        ({"llama.block_count": 10**6}, "block_count|num_hidden_layers"),
        ({"tokenizer.ggml.tokens": 3.5}, "tokenizer.ggml.tokens=3.5 must be a list of texts"),
        ({"tokenizer.ggml.token_type": "x"}, "token_type='x' must be a list of numbers"),
        ({"tokenizer.ggml.eos_token_id": "</s>"}, "eos_token_id='</s>' must be a whole number"),
        ({"tokenizer.chat_template": 5}, "tokenizer.chat_template=5 must be a text"),
    ],
)
def test_values_of_a_wrong_kind_are_refused_by_key(path, extra, must_be):
    write(path, extra=extra)
    with pytest.raises(ModelError, match=must_be):
        GGUFFile(path)


@pytest.mark.parametrize(
    "extra",
    [
        {"pooling_type": 3, "attention.causal": True, "attention.layer_norm_epsilon": 1e-5},
        {"attention.scale": HEAD_DIM**-0.5, "attention.sliding_window": 256, "rope.freq_base_swa": 5e5},
        {"expert_count": 0, "expert_feed_forward_length": 96, "expert_weights_scale": 2.5, "expert_gating_func": 2},
        {"logit_scale": 1.0, "residual_scale": 0.0, "final_logit_softcapping": 0.0, "nextn_predict_layers": 0},
        {"rope.scaling.attn_factor": 1.0, "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0},
    ],
)
def test_settings_that_change_nothing_are_read(path, extra):
    write(path)
    expected = GGUFFile(path).hf_config()
    more = {"general.url": "https://example.org", "quantize.imatrix.file": "m.dat", "tokenizer.ggml.normalizer": "x"}
    write(path, extra={f"llama.{key}": value for key, value in extra.items()} | more)
    assert GGUFFile(path).hf_config() == expected


def test_unknown_tensor_name(path):
    write(path)
    with pytest.raises(CheckpointError, match=r"no tensor 'model.norm.wieght'.*Did you mean 'model.norm.weight'"):
        GGUFFile(path).read("model.norm.wieght")


# The header


def string(text):
    return struct.pack("<Q", len(text)) + text.encode()


def tensor(name, dims=(4,), kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(metadata=(), tensors=(), version=3, data=64):
    counts = struct.pack("<IQQ", version, len(tensors), len(metadata))
    return b"GGUF" + counts + b"".join(metadata) + b"".join(tensors) + bytes(data)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"GGML" + bytes(40), "not a GGUF file"),
        (b"", "not a GGUF file"),
        (header(version=1), "GGUF version 1; versions 2 and 3 are read"),
        (header(version=3 << 24), "it looks big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "damaged or truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "damaged or truncated"),
        (header([struct.pack("<Q", 2**50)]), "damaged or truncated"),
        (header([string("a") + struct.pack("<IIQ", 9, 0, 2**62)]), "damaged or truncated"),
        (header([string("a") + struct.pack("<IIQ", 9, 8, 2**62)]), "damaged or truncated"),
        (header([string("a") + struct.pack("<I", 77)]), "'a' has the value type 77"),
        (header([string("a") + struct.pack("<IIQ", 9, 9, 1)]), "'a' has the value type 9"),
        (header([string("a") + struct.pack("<IB", 0, 1)] * 2), "metadata 'a' is there twice"),
        (header([struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 1)]), "not UTF-8"),
        (header([string("general.alignment") + struct.pack("<II", 4, 24)]), "24, not a power of two"),
        (header([], [tensor("t", kind=999)]), "'t' has the unknown type number 999"),
        (header([], [tensor("t", dims=())]), "0 dimensions"),
        (header([], [tensor("t", dims=(1,) * 9)]), "9 dimensions"),
        (header([], [tensor("t", dims=(33,), kind=8)]), "blocks of 32"),
        (header([], [tensor("t", dims=(0,))]), "does not fit"),
        (header([], [tensor("t", dims=(2**40, 2**40))]), "truncated: tensor 't' ends at byte"),
        (header([], [tensor("t", offset=2**64 - 32)]), "truncated: tensor 't' ends at byte"),
        (header([], [tensor("t"), tensor("u", offset=8)]), "'u' overlaps 't'"),
        (header([], [tensor("t"), tensor("t", offset=32)], data=99), "tensor 't' is there twice"),
    ],
)  # fmt: skip
def test_refuses_damaged_headers(path, raw, match):
    with open(path, "wb") as file:
        file.write(raw)
    with pytest.raises(CheckpointError, match=match):
        read_header(path)


def test_every_truncation_is_refused(path):
    write(path)
    size = os.path.getsize(path)
    for cut in (size - 1, *range(size - 2, 0, -997), 0):
        os.truncate(path, cut)
        with pytest.raises(CheckpointError):
            read_header(path)
    with pytest.raises(CheckpointError, match="no GGUF file at"):
        read_header(path + ".absent")


def test_header_equals_the_librarys_reader(path):
    write(path, extra={"a.list": [1, 2], "a.names": ["x", "y"], "a.flag": True, "a.text": "é", "a.float": 0.5})
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert np.array_equal(ours.metadata[key], field.contents()), key
    assert set(ours.tensors) == {t.name for t in theirs.tensors}
    for t in theirs.tensors:
        mine = ours.tensors[t.name]
        assert (mine.offset, mine.nbytes, mine.type) == (t.data_offset, t.n_bytes, t.tensor_type)
        assert mine.shape == tuple(t.shape.tolist()[::-1])
