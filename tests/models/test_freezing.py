"""Which parameters patterns find, how stacks are cut for them, and what is refused."""

import numpy as np
import pytest
from flax import nnx

from jaxft import models
from jaxft.checkpoint.hf import hf_tensors, param_tensors
from jaxft.checkpoint.load import load_model
from jaxft.errors import ModelError
from jaxft.nn.stack import group_layers
from jaxft.training.state import divide
from jaxft.trees import flatten

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))


@pytest.fixture
def config(smoke_config):
    return models.config_from_hf(smoke_config | {"num_hidden_layers": 6, "tie_word_embeddings": False})


def moving_tensors(model):
    """Hugging Face's names of what moves, by the model's own table."""
    return {
        piece.hf
        for path, placed in param_tensors(model).items()
        if path in model.trainable_paths
        for piece in placed.pieces
    }


@pytest.mark.parametrize(
    ("trainable", "stacks", "within"),
    [
        ("lm_head", [6], {"lm_head.weight"}),
        ("norm, layers.5", [5, 1], {"model.norm.weight", "model.layers.5."}),
        ("layers.2-3", [2, 2, 2], {"model.layers.2.", "model.layers.3."}),
        ("layers.0-2.mlp", [3, 3], {f"model.layers.{i}.mlp." for i in range(3)}),
        ("self_attn.[qk]_proj", [6], {f"model.layers.{i}.self_attn.{n}_proj." for i in range(6) for n in "qk"}),
        ("mlp.up_proj,layers.1.self_attn.*_proj", [1, 1, 4],
         {f"model.layers.{i}.mlp.up_proj" for i in range(6)} | {f"model.layers.1.self_attn.{n}_proj" for n in "qkvo"}),
        ("layers.4-5,-*norm*", [4, 2], {f"model.layers.{i}.{n}." for i in (4, 5) for n in ("mlp", "self_attn")}),
    ],
)  # fmt: skip
def test_patterns_choose_by_hugging_faces_names(config, trainable, stacks, within):
    model = models.abstract_model(config, trainable=trainable)
    assert [len(group) for group in group_layers(model.segments)] == stacks
    names = {piece.hf for placed in param_tensors(model).values() for piece in placed.pieces}
    assert moving_tensors(model) == {name for name in names if name.startswith(tuple(within))}
    _, trainable, frozen = divide(model)
    assert set(flatten(trainable)[0]) == model.trainable_paths
    assert len(flatten(trainable)[0]) + len(flatten(frozen)[0]) == len(flatten(nnx.state(model))[0])


def test_patterns_that_only_take_away_leave_the_rest(config):
    model = models.abstract_model(config, trainable="-embed_tokens,-lm_head")
    every = flatten(nnx.state(model))[0]
    assert set(every) - model.trainable_paths == {"embed_tokens/embedding", "lm_head/kernel"}


def test_what_moves_is_float32_whatever_the_rest_is_stored_in(config):
    model = models.abstract_model(config, param_dtype="bfloat16", trainable="layers.3-5.mlp")
    types = {path: str(leaf.dtype) for path, leaf in flatten(nnx.state(model))[0].items()}
    assert {path for path, kind in types.items() if kind == "float32"} == model.trainable_paths
    assert set(types.values()) == {"float32", "bfloat16"}


def test_alternating_layers_are_cut_into_few_stacks(smoke_config):
    pattern = ["sliding_attention"] * 5 + ["full_attention"]
    hf = smoke_config | {
        "model_type": "gemma3_text", "num_hidden_layers": 48, "layer_types": pattern * 8, "sliding_window": 8,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 16,
    }  # fmt: skip
    hf = {key: value for key, value in hf.items() if key not in ("hidden_act", "attention_bias", "mlp_bias")}
    model = models.abstract_model(models.config_from_hf(hf), trainable="layers.24-47")
    assert [len(group) for group in group_layers(model.segments)] == [4] * 12


def test_a_model_cut_apart_is_the_same_model(tiny_llama):
    whole, cut = load_model(tiny_llama("plain")), load_model(tiny_llama("plain"), trainable="layers.1,norm")
    assert len(cut.module.layers) == 3
    np.testing.assert_allclose(cut.logits(TOKENS), whole.logits(TOKENS), rtol=0, atol=1e-5)
    written = {name: make() for name, (_, make) in hf_tensors(cut.module).items()}
    for name, (_, make) in hf_tensors(whole.module).items():
        np.testing.assert_array_equal(written.pop(name), make())
    assert not written


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        ("mpl", "'mpl' matches no parameter. Did you mean 'mlp'"),
        ("layer.2-3", r"'layer.2-3' matches no parameter. Did you mean 'layers"),
        ("layers.2-3.mpl", r"Did you mean 'layers.\*.mlp'"),
        ("norm,layers.4-6", "'layers.4-6': 4-6 is not within 0-5"),
        ("layers.8-9.mlp", "8-9 is not within 0-5"),
        ("layers.3-2", "3-2 is not within 0-5|matches no parameter"),
        ("-*", "leaves nothing to train"),
        (" , ", "leaves nothing to train"),
        ("norm,-norm", "leaves nothing to train"),
    ],
)
def test_patterns_without_effect_are_refused(config, trainable, message):
    with pytest.raises(ModelError, match=message):
        models.abstract_model(config, trainable=trainable)


def test_a_head_that_is_tied_is_named_by_its_table(smoke_config):
    with pytest.raises(ModelError, match="matches no parameter. The head is tied to embed_tokens"):
        models.abstract_model(models.config_from_hf(smoke_config), trainable="lm_head")


def test_some_experts_of_a_layer_are_refused(smoke_config):
    hf = smoke_config | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    hf = {key: value for key, value in hf.items() if key not in ("attention_bias", "mlp_bias")}
    config = models.config_from_hf(hf)
    with pytest.raises(
        ModelError, match="takes 2 of the 4 experts of layers/0/mlp/.*one array and can only be trained together"
    ):
        models.abstract_model(config, trainable="experts.0-1")
    assert models.abstract_model(config, trainable="experts").trainable_paths
