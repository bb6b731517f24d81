"""A base and its adapter as one source: parts equal the whole, and adapters that do not fit are refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxft.checkpoint.merged import MergedSource
from jaxft.checkpoint.peft import folder as peft_folder
from jaxft.checkpoint.tensors import SafetensorsFolder
from jaxft.errors import CheckpointError, ModelError

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "base").mkdir()
    tensors = {f"{NAME}.weight": rng.normal(size=(6, 5)), "model.norm.weight": rng.normal(size=5)}
    tensors["model.embed_tokens.weight"] = rng.normal(size=(7, 5))
    save_file({k: v.astype(np.float16) for k, v in tensors.items()}, tmp_path / "base" / "model.safetensors")
    return SafetensorsFolder(tmp_path / "base")


def write(folder, tensors, **settings):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / peft_folder.WEIGHTS)
    (folder / peft_folder.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6} | settings))
    return folder


def halves(name=NAME, a=(2, 5), b=(6, 2)):
    rng = np.random.default_rng(1)
    key = f"{peft_folder.PREFIX}{name}"
    return {
        f"{key}.lora_A.weight": rng.normal(size=a).astype(np.float32),
        f"{key}.lora_B.weight": rng.normal(size=b).astype(np.float32),
    }


@pytest.mark.parametrize(("settings", "scale"), [({}, 3.0), ({"use_rslora": True}, 6 / np.sqrt(2))])
def test_adapted_matrices_are_merged_in_float32_whole_or_in_parts(base, tmp_path, settings, scale):
    tensors = halves()
    source = MergedSource(base, write(tmp_path / "lora", tensors, **settings))
    a, b = tensors.values()
    wanted = base.read(f"{NAME}.weight").astype(np.float32) + scale * (b @ a)
    assert source.specs()[f"{NAME}.weight"].dtype == np.float32
    np.testing.assert_allclose(source.read(f"{NAME}.weight"), wanted, rtol=1e-6)
    part = source.read(f"{NAME}.weight", (slice(1, 4), slice(2, 5)))
    np.testing.assert_allclose(part, wanted[1:4, 2:5], rtol=1e-6)
    assert source.read("model.norm.weight").dtype == np.float16, "what has no adapter is left alone"


def test_the_copy_of_the_base_beside_an_adapter_replaces_it(base, tmp_path):
    copy = {f"{peft_folder.PREFIX}{NAME}.base_layer.weight": base.read(f"{NAME}.weight")}
    assert MergedSource(base, write(tmp_path / "same", halves() | copy)).specs()
    other = {key: value + 1 for key, value in copy.items()}
    source = MergedSource(base, write(tmp_path / "other", halves() | other))
    assert f"has other values of {NAME}.weight than its base" in source.notes[0]
    same = MergedSource(base, tmp_path / "same").read(f"{NAME}.weight")
    np.testing.assert_allclose(source.read(f"{NAME}.weight"), same + 1, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (halves("model.layers.7.self_attn.q_proj"), r"layers\.7.* names no matrix of the base"),
        (halves("model.norm"), r"model\.norm.* names no matrix"),
        (halves(b=(5, 2)), r"lora_B\.weight is \[5, 2\], the base wants \[6, 2\]"),
        (dict(list(halves().items())[:1]), r"lacks its lora_B\.weight"),
        ({f"x.{NAME}.lora_A.weight": np.zeros((2, 5), np.float32)}, r"names no matrix"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(base, tmp_path, tensors, match):
    with pytest.raises(CheckpointError, match=match):
        MergedSource(base, write(tmp_path / "lora", tensors))


def test_settings_that_are_not_implemented_are_refused(base, tmp_path):
    with pytest.raises(ModelError, match=r"twist=True"):
        MergedSource(base, write(tmp_path / "lora", halves(), twist=True))


def test_a_bias_needs_a_layer_with_a_bias(base, tmp_path):
    bias = {f"{peft_folder.PREFIX}{NAME}.lora_B.bias": np.ones(6, np.float32)}
    with pytest.raises(ModelError, match=r"adds a bias .* which has none in its base"):
        MergedSource(base, write(tmp_path / "lora", halves() | bias, lora_bias=True))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, r"lacks its lora_magnitude_vector"),
        ({"rank_pattern": {"q_proj": 3}}, r"lora_A\.weight is \[2, 5\], the base wants \[3, 5\]"),
        ({"modules_to_save": ["model.norm"]}, r"model\.norm, which modules_to_save names, has no tensor"),
    ],
)
def test_what_the_settings_promise_must_be_there(base, tmp_path, settings, match):
    with pytest.raises(CheckpointError, match=match):
        MergedSource(base, write(tmp_path / "lora", halves(), **settings))
