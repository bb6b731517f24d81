"""Folders whose tensors have other names, or another head than their config.json says: what transformers computes."""

import json

import numpy as np
import pytest

from jaxft import models
from jaxft.checkpoint import hf
from jaxft.checkpoint.folders.opening import folder_config
from jaxft.checkpoint.load import load_model
from jaxft.config import load
from jaxft.errors import CheckpointError, ModelError
from jaxft.models.hf_fields import with_allowed
from jaxft.planning.shapes import shapes_of

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 9))
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """tensors(tied) -> those of a random model."""
    from safetensors.numpy import load_file

    def make(tied):
        path = tmp_path_factory.mktemp("model")
        config = models.config_from_hf(CONFIG | {"tie_word_embeddings": tied})
        hf.write_weights(models.random_model(config, seed=0), str(path))
        return {name: 5 * value for name, value in load_file(path / "model.safetensors").items()}

    return {tied: make(tied) for tied in (True, False)}.__getitem__


def save(folder, tensors, **changes):
    from safetensors.numpy import save_file

    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return str(folder)


def theirs(folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def check(folder, reference=None):
    logits = load_model(folder).logits(TOKENS)
    expected = theirs(folder) if reference is None else theirs(reference)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def renamed(tensors, rename):
    return {rename(name): value for name, value in tensors.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_a_body_that_was_saved_alone_is_read_with_and_without_its_head(tensors, tmp_path, tied):
    bare = renamed(tensors(tied), lambda name: name.removeprefix("model."))
    check(save(tmp_path / "bare", bare, tie_word_embeddings=tied))


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace("model.layers.1.", "model.layers.1._checkpoint_wrapped_module."),
    ],
    ids=["compiled", "distributed", "both", "checkpointed"],
)
def test_prefixes_of_wrappers_are_taken_off(tensors, tmp_path, rename):
    plain = save(tmp_path / "plain", tensors(False))
    check(save(tmp_path / "wrapped", renamed(tensors(False), rename)), plain)


def test_two_tensors_of_one_name_are_refused(tensors, tmp_path):
    twice = tensors(False) | {f"module.{TABLE}": tensors(False)[TABLE]}
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' is there as .* and as 'module.model.embed"):
        load_model(save(tmp_path / "twice", twice))


def test_a_head_of_its_own_counts_although_config_json_ties_it(tensors, tmp_path):
    folder = save(tmp_path / "untied", tensors(False), tie_word_embeddings=True)
    loaded = load_model(folder)
    assert loaded.notes == ("lm_head.weight differs from the embedding, although config.json ties them: both are read",)
    assert folder_config(folder)["tie_word_embeddings"] is False and loaded.module.lm_head is not None
    check(folder)
    (tmp_path / "written").mkdir()
    hf.write_weights(loaded.module, str(tmp_path / "written"))
    hf.write_config(str(tmp_path / "written"), loaded.hf_config, dtype="float32")
    check(str(tmp_path / "written"), folder)


def test_one_table_under_either_name_or_both_is_tied(tensors, tmp_path):
    one = tensors(True)
    plain = save(tmp_path / "plain", one, tie_word_embeddings=True)
    copied = save(tmp_path / "copied", one | {HEAD: one[TABLE]}, tie_word_embeddings=True)
    head = save(tmp_path / "head", renamed(one, lambda name: HEAD if name == TABLE else name), tie_word_embeddings=True)
    for folder in (copied, head):
        assert load_model(folder).module.lm_head is None and load_model(folder).notes == ()
        check(folder, plain)


def test_an_untied_model_without_a_head_is_refused(tensors, tmp_path):
    body = {name: value for name, value in tensors(False).items() if name != HEAD}
    folder = save(tmp_path / "headless", body)
    with pytest.raises(CheckpointError, match=r"missing lm_head.weight \[40, 16\].*set tie_word_embeddings to true"):
        load_model(folder)
    assert load_model(folder, head="score").module.value is not None


def test_a_value_head_is_left_out_with_a_word(tensors, tmp_path):
    plain = save(tmp_path / "plain", tensors(False))
    extra = {"v_head.summary.weight": np.ones((1, 16), np.float32), "v_head.summary.bias": np.ones(1, np.float32)}
    nested = renamed(tensors(False), lambda name: f"pretrained_model.{name}")
    for number, body in enumerate((tensors(False), nested)):
        folder = save(tmp_path / f"value{number}", body | extra)
        check(folder, plain)
        assert load_model(folder).notes[0].startswith("left out: v_head.summary.bias, v_head.summary.weight, the value")


def test_fields_that_are_allowed_reach_the_model(tensors, tmp_path):
    folder = save(tmp_path / "strange", tensors(False), window_scale=3)
    assert load_model(folder, allow_unknown=["window_scale"]).hf_config == with_allowed(
        CONFIG | {"window_scale": 3}, ["window_scale"]
    )


def test_fields_that_are_allowed_reach_plans_too(tensors, tmp_path):
    folder = save(tmp_path / "strange", tensors(True), window_scale=3, tie_word_embeddings=True)
    given = [f"model.path={folder}", "data.train=rows.jsonl", f"output_dir={tmp_path}/run"]
    with pytest.raises(ModelError, match=r"window_scale=3 \(unknown\)"):
        shapes_of(load(None, given))
    assert shapes_of(load(None, [*given, "model.allow_unknown=window_scale"]))[0]["tie_word_embeddings"] is True


def test_null_means_absent_where_it_can_mean_nothing_else(tensors, tmp_path):
    plain = save(tmp_path / "plain", tensors(False))
    nulls = dict.fromkeys(("rope_theta", "tie_word_embeddings", "initializer_range", "rope_scaling"))
    check(save(tmp_path / "nulls", tensors(False), **nulls), plain)
