"""MXFP4 files against transformers' own unpacking of them, on the way in and out again."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxft import models
from jaxft.checkpoint.hf import hf_shape, param_tensors
from jaxft.checkpoint.load import load_model, open_weights
from jaxft.checkpoint.quantized.mxfp4 import MXFP4Source, unpack
from jaxft.checkpoint.tensors import TensorSpec
from jaxft.config import MeshConfig
from jaxft.conversion.convert import convert
from jaxft.errors import CheckpointError
from jaxft.sharding.mesh import make_mesh_plan
from jaxft.trees import flatten

CONFIG = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 96, "hidden_size": 64,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, "eos_token_id": 2,
    "pad_token_id": 0, "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
}  # fmt: skip
EXPERTS = "model.layers.1.mlp.experts"
TOKENS = np.random.default_rng(0).integers(1, 96, (2, 12))


def theirs(blocks, scales):
    """What transformers makes of packed tensors, as bits."""
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    return mxfp4.convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales)).view(torch.uint16).numpy()


def packed(shape, rng):
    """Random blocks and scales of one [E, I, O] tensor, around 1 / 32."""
    experts, inputs, outputs = shape
    grouped = (experts, outputs, inputs // 32)
    return rng.integers(0, 256, (*grouped, 16), np.uint8), rng.integers(120, 125, grouped, np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A gpt-oss as published: bfloat16, the experts' matrices packed."""
    path, rng = tmp_path_factory.mktemp("packed"), np.random.default_rng(0)
    model = models.abstract_model(models.config_from_hf(CONFIG))
    leaves, tensors = flatten(nnx.state(model))[0], {}
    for place, placed in param_tensors(model).items():
        for piece in placed.pieces:
            shape = hf_shape(placed, piece, leaves[place].shape)
            if piece.hf.endswith(("gate_up_proj", "down_proj")):
                tensors[f"{piece.hf}_blocks"], tensors[f"{piece.hf}_scales"] = packed(shape, rng)
            else:
                tensors[piece.hf] = (0.2 * rng.normal(size=shape) + ("norm" in piece.hf)).astype(ml_dtypes.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_every_byte_under_every_scale_is_transformers_number():
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (1, 255, 16, 16)).copy()
    scales = np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], (1, 255, 16)).copy()
    ours = unpack(blocks[0], scales[0])
    np.testing.assert_array_equal(ours.view(np.uint16).T, theirs(blocks, scales)[0])
    # Two by hand: low bits first; 0x7 is 6, 0x9 is -0.5, and scale 128 is 2.
    assert ours[128, 16 * 2 * 9 + 2 * 7 :][:2].tolist() == [12.0, -1.0]


def test_a_packed_model_loads_as_transformers_loads_it(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        quantization_config=transformers.Mxfp4Config(dequantize=True),
    )
    loaded = load_model(str(folder))
    state, parameters = flatten(nnx.state(loaded.module))[0], dict(reference.named_parameters())
    for path, placed in param_tensors(loaded.module).items():
        for piece in placed.pieces:
            part = placed.transform.to_hf(np.asarray(state[path][piece.at]))
            np.testing.assert_array_equal(part, parameters[piece.hf].detach().numpy(), err_msg=piece.hf)
    with torch.no_grad():
        expected = reference(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"])
@pytest.mark.parametrize("cut", [(), (slice(1, 3), slice(5, 30), slice(7, 21)), (slice(2, 3), slice(31, None))])
def test_a_block_is_that_part_of_the_whole(folder, name, cut):
    _, source, _ = open_weights(str(folder))
    stored = load_file(folder / "model.safetensors")
    whole = theirs(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    assert source.specs()[name] == TensorSpec(whole.shape, np.dtype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(source.read(name, cut).view(np.uint16), whole[cut])


def test_devices_hold_their_parts(folder):
    split = load_model(str(folder), mesh=make_mesh_plan(MeshConfig(fsdp=8)), param_dtype="bfloat16")
    one, parts = (
        flatten(nnx.state(m))[0] for m in (load_model(str(folder), param_dtype="bfloat16").module, split.module)
    )
    path = "layers/0/mlp/gate_up_proj/kernel"
    assert parts[path].sharding.shard_shape(parts[path].shape) == (1, 4, 8, 64)
    jax.tree.map(np.testing.assert_array_equal, one, parts)


def test_an_expert_at_a_time_is_read(folder, monkeypatch):
    largest = {}
    read = MXFP4Source.read

    def watched(self, name, index=None):
        block = read(self, name, index)
        largest[name] = max(largest.get(name, 0), block.size)
        return block

    monkeypatch.setattr(MXFP4Source, "read", watched)
    load_model(str(folder))
    assert largest[f"{EXPERTS}.gate_up_proj"] == 64 * 64
    assert largest[f"{EXPERTS}.down_proj"] == 32 * 64


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_what_is_written_is_not_packed_any_more(folder, tmp_path, form):
    figures = convert(str(folder), str(tmp_path / "out"), form=form)
    assert figures["dtype"] == "bfloat16"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    before, after = (flatten(nnx.state(load_model(str(p)).module))[0] for p in (folder, tmp_path / "out"))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    if form == "orbax":
        # One expert of one layer, and of it what one of the eight devices held.
        described = tmp_path / "out" / "params" / "layers.0.mlp.gate_up_proj.kernel" / ".zarray"
        assert json.loads(described.read_text())["chunks"] == [1, 1, 8, 64]
    else:
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        assert again.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.bfloat16
        stored = load_file(folder / "model.safetensors")
        for name in ("gate_up_proj", "down_proj"):
            bits = getattr(again.model.layers[1].mlp.experts, name).detach().view(torch.uint16).numpy()
            expected = theirs(stored[f"{EXPERTS}.{name}_blocks"], stored[f"{EXPERTS}.{name}_scales"])
            np.testing.assert_array_equal(bits, expected)


class Memory:
    """Arrays as a source."""

    def __init__(self, **arrays):
        self.arrays = arrays

    def specs(self):
        return {name: TensorSpec(array.shape, array.dtype) for name, array in self.arrays.items()}

    def read(self, name, index=None):
        return self.arrays[name][index or ()]


BLOCKS, SCALES = np.zeros((2, 3, 4, 16), np.uint8), np.zeros((2, 3, 4), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_blocks": BLOCKS}, "1 tensors are not whole in MXFP4:\n  x: has no _scales"),
        ({"x_scales": SCALES}, "x: has no _blocks"),
        ({"x_blocks": BLOCKS, "x_scales": SCALES[:1]}, r"x: blocks \[2, 3, 4, 16\] and scales \[1, 3, 4\] are not"),
        ({"x_blocks": BLOCKS[..., :8], "x_scales": SCALES}, r"blocks \[2, 3, 4, 8\]"),
        ({"x_blocks": BLOCKS[0], "x_scales": SCALES[0]}, r"blocks \[3, 4, 16\]"),
        ({"x_blocks": BLOCKS.astype(np.int8), "x_scales": SCALES}, "bytes, not int8 and uint8"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arrays, message):
    with pytest.raises(CheckpointError, match=message):
        MXFP4Source(Memory(**arrays))


def test_a_scale_that_is_no_number_is_refused():
    scales = SCALES.copy()
    scales[1, 2, 3] = 255
    source = MXFP4Source(Memory(x_blocks=BLOCKS, x_scales=scales))
    assert not source.read("x", (slice(0, 1),)).any()
    with pytest.raises(CheckpointError, match="x: a scale of expert 1 is 255, which is not a number"):
        source.read("x")


def test_packed_tensors_that_the_config_does_not_announce_are_refused(folder, tmp_path):
    plain = {k: v for k, v in CONFIG.items() if k != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=rf"missing {EXPERTS}.down_proj \[4, 32, 64\]"):
        load_model(str(tmp_path))
