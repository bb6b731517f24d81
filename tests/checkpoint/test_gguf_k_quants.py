"""Q4_K_M and Q5_K_M: the types that llama.cpp's quantiser gives the tensors, their bytes, and what is read back."""

import builtins
import ctypes
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from jaxft import models
from jaxft.checkpoint.gguf import GGUFFile, kinds
from jaxft.checkpoint.gguf.kinds import file_kinds, quantize
from jaxft.checkpoint.gguf.names import gguf_modules
from jaxft.checkpoint.gguf.settings import family_of
from jaxft.checkpoint.gguf.write import check_gguf, write_gguf, write_gguf_adapter
from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.errors import ExportError
from jaxft.files.gguf.header import read_header

pytest.importorskip("libgguf")
LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    "rope_theta": 5e5, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}


def types_of(dtype, width=4096, **fields):
    """{part: [type of layer 0, 1, ...]} for rows of `width` inputs; -1 is alone in its list."""
    hf = LLAMA | fields
    family, config = family_of(hf), models.config_from_hf(hf)
    made = file_kinds(dtype, family, config)
    experts = getattr(config, "num_local_experts", 0)
    out = {}
    for module in gguf_modules(family, config.num_hidden_layers, experts).values():
        if module.expert in (None, 0):
            out.setdefault(module.part, []).append(made.kind((8, width), module).name)
    return out


def test_the_layers_with_more_bits_are_those_of_llama_3_8b():
    types = types_of("q4_k_m")
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    expected = ["Q6_K" if layer in more else "Q4_K" for layer in range(32)]
    assert types["attn_v"] == types["ffn_down"] == expected
    for part in ("attn_q", "attn_k", "attn_output", "ffn_gate", "ffn_up"):
        assert set(types[part]) == {"Q4_K"}
    assert types["token_embd"] == ["Q4_K"] and types["output"] == ["Q6_K"]
    assert [kind.replace("Q5", "Q4") for kind in types_of("q5_k_m")["attn_v"]] == expected
    assert types_of("q5_k_m", tie_word_embeddings=True)["token_embd"] == ["Q6_K"]


def test_a_70b_and_eight_experts_have_rules_of_their_own():
    large = types_of("q4_k_m", num_hidden_layers=80)
    assert set(large["attn_v"]) == {"Q5_K", "Q6_K"} and set(large["ffn_down"]) == {"Q4_K", "Q6_K"}
    sparse = types_of("q4_k_m", **EXPERTS)
    assert set(sparse["attn_v"] + sparse["attn_k"]) == {"Q8_0"} and set(sparse["attn_output"]) == {"Q5_K"}
    assert set(sparse["ffn_gate_inp"]) == {"F32"} and set(sparse["ffn_down_exps"]) == {"Q4_K", "Q6_K"}
    assert set(types_of("q5_k_m", **EXPERTS)["attn_output"]) == {"Q5_K"}


@pytest.mark.parametrize(("dtype", "small"), [("q4_k_m", "Q5_0"), ("q5_k_m", "Q5_1")])
def test_rows_that_do_not_fill_blocks_get_smaller_ones(dtype, small):
    narrow = types_of(dtype, width=576)
    assert set(narrow["attn_q"]) == {small} and set(narrow["attn_v"]) == {small, "Q8_0"}
    assert narrow["output"] == ["Q8_0"]
    assert set(types_of(dtype, width=40)["attn_q"]) == {"F16"}


def tiny():
    """(config.json, tensors) of a random model whose rows fill blocks of 256."""
    hf = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
                  "num_key_value_heads": 4}  # fmt: skip
    model = models.random_model(models.config_from_hf(hf), seed=0)
    arrays = {name: make() for name, (_, make) in hf_tensors(model).items()}
    return hf, {name: (TensorSpec(a.shape, a.dtype), lambda a=a: a) for name, a in arrays.items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """{dtype: path}, and the tensors."""
    hf, tensors = tiny()
    paths = {}
    for dtype in ("q4_k_m", "q5_k_m", "q8_0"):
        paths[dtype] = str(tmp_path_factory.mktemp("k") / f"{dtype}.gguf")
        write_gguf(paths[dtype], hf, tensors, dtype=dtype, tokenizer={}, name="tiny")
    return paths, tensors


def test_a_file_is_close_to_its_source_and_the_closer_the_more_bits_it_has(written):
    paths, tensors = written
    name = "model.layers.2.self_attn.q_proj.weight"
    source = tensors[name][1]()
    errors = {}
    for dtype, path in paths.items():
        check_gguf(path, tensors, dtype=dtype)
        errors[dtype] = np.sqrt(np.mean((GGUFFile(path).read(name) - source) ** 2)) / source.std()
    assert 0.001 < errors["q8_0"] < 0.01 < errors["q5_k_m"] < 0.05 < errors["q4_k_m"] < 0.1
    assert [read_header(paths[d]).metadata["general.file_type"] for d in ("q4_k_m", "q5_k_m")] == [15, 17]
    types = {tensor.name: tensor.type.name for tensor in read_header(paths["q4_k_m"]).tensors.values()}
    assert types["blk.1.attn_v.weight"] == "Q4_K" and types["blk.2.attn_v.weight"] == "Q6_K"
    assert types["blk.0.attn_norm.weight"] == "F32" and types["output.weight"] == "Q6_K"


def test_a_file_that_differs_from_its_source_is_refused(written):
    paths, tensors = written
    name = "model.layers.1.mlp.up_proj.weight"
    spec, make = tensors[name]
    with pytest.raises(ExportError, match=f"tensor '{name}' reads back differently"):
        check_gguf(paths["q4_k_m"], tensors | {name: (spec, lambda: make() + 0.1)}, dtype="q4_k_m")


def test_without_libgguf_the_package_is_named(monkeypatch):
    kinds._libgguf.cache_clear()
    true_import = builtins.__import__

    def absent(name, *args, **kwargs):
        if name == "libgguf":
            raise ImportError(name)
        return true_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ExportError, match=r"pip install 'jaxft\[k-quants\]', or write q8_0"):
        types_of("q4_k_m")
    kinds._libgguf.cache_clear()


def test_an_adapter_has_no_such_type(tmp_path):
    with pytest.raises(ExportError, match="do not fill blocks of q4_k_m; use float32, float16 or bfloat16"):
        write_gguf_adapter(str(tmp_path / "a.gguf"), str(tmp_path), LLAMA, dtype="q4_k_m")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q8_0"])
def test_the_bytes_are_those_of_llama_cpp(kind):
    package = importlib.util.find_spec("xllamacpp")
    if package is None:
        pytest.skip("the package xllamacpp, which holds llama.cpp, is not installed")
    library = next(Path(package.submodule_search_locations[0]).glob("*.so"))
    llama_cpp = ctypes.CDLL(str(library))
    llama_cpp.ggml_quantize_chunk.restype = ctypes.c_size_t
    rows = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    rows[3] = 0
    rows[4, 7] = 300
    ours = quantize(rows, Kind[kind])
    theirs = np.zeros_like(ours)
    pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (rows, theirs))
    count = llama_cpp.ggml_quantize_chunk(
        ctypes.c_int(Kind[kind]), *pointers, ctypes.c_int64(0), ctypes.c_int64(64), ctypes.c_int64(512), None
    )
    assert count == ours.nbytes
    np.testing.assert_array_equal(ours, theirs)
    assert np.isfinite(dequantize(ours, Kind[kind])).all()
