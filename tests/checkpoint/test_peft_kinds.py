"""VeRA, IA3, prompts and prefixes: PEFT folders both ways against PEFT itself, gradients, merging, refusals."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxft.adapters.attach import detach, merge
from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import load_model, open_weights
from jaxft.checkpoint.merged import MergedSource
from jaxft.checkpoint.peft import write_adapter
from jaxft.errors import CheckpointError, ModelError
from jaxft.training.state import divide

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

TOKENS = np.random.default_rng(0).integers(0, 96, (2, 12))
CASES = {
    "vera": (peft.VeraConfig, {"r": 6, "target_modules": "all-linear", "init_weights": False}),
    "vera of a seed": (
        peft.VeraConfig,
        {"r": 40, "target_modules": ["q_proj", "down_proj"], "save_projection": False, "projection_prng_key": 77,
         "init_weights": False},
    ),
    "ia3": (
        peft.IA3Config,
        {"target_modules": ["k_proj", "v_proj", "up_proj", "down_proj"], "feedforward_modules": ["down_proj"],
         "init_ia3_weights": False},
    ),
    "ia3 by pattern": (
        peft.IA3Config,
        {"target_modules": r".*\.(o|gate)_proj", "feedforward_modules": r".*\.[12]\.self_attn\.nothing",
         "init_ia3_weights": False},
    ),
    "vera and a head": (
        peft.VeraConfig,
        {"r": 6, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "k_proj"], "init_weights": False},
    ),
    "ia3 and a norm": (
        peft.IA3Config,
        {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"],
         "modules_to_save": ["model.norm", "embed_tokens"], "init_ia3_weights": False},
    ),
    "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 5}),
    "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 5}),
    "prefix behind an MLP": (peft.PrefixTuningConfig, {"num_virtual_tokens": 3, "prefix_projection": True}),
}  # fmt: skip
VIRTUAL = ("prompt", "prefix", "prefix behind an MLP")
EXTRA = r"\.(modules_to_save|default)\b"  # in the names of PEFT's parameters alone, not of its folders
MERGEABLE = [name for name in CASES if name not in VIRTUAL]


def torch_logits(model, grad=False):
    with torch.set_grad_enabled(grad):
        tokens = torch.tensor(TOKENS)
        return model(tokens, attention_mask=torch.ones_like(tokens)).logits[:, -TOKENS.shape[1] :]


@pytest.fixture
def by_peft(tiny_llama, torch_llama, tmp_path):
    """by_peft(case) -> (PEFT's model, its folder, the base's folder)."""

    def make(case, variant="biases"):
        torch.manual_seed(0)
        kind, settings = CASES[case]
        base = tiny_llama(variant)
        model = peft.get_peft_model(torch_llama(base), kind(task_type="CAUSAL_LM", **settings)).eval()
        model.save_pretrained(tmp_path / "theirs")
        return model, str(tmp_path / "theirs"), base

    return make


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_folders_both_ways_give_pefts_logits(by_peft, torch_llama, tmp_path, case):
    reference, folder, base = by_peft(case)
    expected = torch_logits(reference).numpy()
    loaded = load_model(folder)
    assert np.abs(expected - load_model(base).logits(TOKENS)).max() > 0.1
    np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=2e-5)
    write_adapter(loaded.module, str(tmp_path / "ours"), base=base)
    theirs, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)
    if case.startswith("vera"):
        # Always written, and those that PEFT drew, to the bit.
        for name in "AB":
            drawn = next(held for key, held in reference.named_buffers() if f"vera_{name}" in key).numpy()
            np.testing.assert_array_equal(ours[f"base_model.vera_{name}"], drawn)
    assert set(ours) - set(theirs) <= {"base_model.vera_A", "base_model.vera_B"}
    again = peft.PeftModel.from_pretrained(torch_llama(base), str(tmp_path / "ours")).eval()
    np.testing.assert_allclose(torch_logits(again).numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("case", ["vera", "vera and a head", "ia3", "ia3 and a norm", "prompt", "prefix"])
def test_gradients_equal_pefts(by_peft, tmp_path, case):
    reference, folder, base = by_peft(case)
    torch_logits(reference, grad=True).square().sum().backward()
    expected = {
        "prompt_embeddings" if "prompt_encoder" in name else re.sub(EXTRA, "", name): p.grad.numpy()
        for name, p in reference.named_parameters()
        if p.requires_grad
    }
    loaded = load_model(folder)
    graphdef, trainable, frozen = divide(loaded.module)
    virtual = list(range(2**30, 2**30 + loaded.module.virtual_tokens))
    tokens = np.concatenate([np.tile(np.array(virtual, np.int64), (2, 1)), TOKENS], axis=1).astype(np.int32)

    def total(trainable):
        module = nnx.merge(graphdef, trainable, frozen)
        return (module.unembed(module(tokens)[0][:, len(virtual) :]) ** 2).sum()

    nnx.update(loaded.module, jax.jit(jax.grad(total))(trainable))
    write_adapter(loaded.module, str(tmp_path / "grads"), base=base)
    written = load_file(tmp_path / "grads" / "adapter_model.safetensors")
    assert set(written) - set(expected) <= {"base_model.vera_A", "base_model.vera_B"} and set(expected) <= set(written)
    for name, grad in expected.items():
        np.testing.assert_allclose(written[name], grad, rtol=1e-4, atol=1e-4 * np.abs(grad).max(), err_msg=name)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", MERGEABLE)
def test_merged_in_memory_and_while_reading_as_peft_merges(by_peft, case):
    reference, folder, base = by_peft(case)
    loaded = load_model(folder)
    live = loaded.logits(TOKENS)
    ours = {name: make() for name, (_, make) in hf_tensors(loaded.module).items()}
    streamed = MergedSource(open_weights(base)[1], folder)
    theirs = reference.merge_and_unload().state_dict()
    assert set(theirs) == set(ours) == set(streamed.specs())
    for name, tensor in theirs.items():
        np.testing.assert_allclose(ours[name], tensor.numpy(), rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(streamed.read(name), tensor.numpy(), rtol=0, atol=1e-6, err_msg=name)
    merge(loaded.module)
    np.testing.assert_allclose(load_model(base).__class__(loaded.module, {}, base).logits(TOKENS), live, atol=2e-5)


def test_a_block_of_a_merged_tensor_is_that_block(by_peft):
    for case in ("vera", "ia3"):
        _, folder, base = by_peft(case)
        streamed = MergedSource(open_weights(base)[1], folder)
        for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
            block = (slice(3, 9), slice(8, 30))
            np.testing.assert_array_equal(streamed.read(name, block), streamed.read(name)[block])
        bias = "model.layers.0.self_attn.k_proj.bias"
        np.testing.assert_array_equal(streamed.read(bias, (slice(2, 5),)), streamed.read(bias)[2:5])


@pytest.mark.parametrize("case", ["prompt", "prefix"])
def test_virtual_tokens_cannot_be_merged(by_peft, case):
    _, folder, base = by_peft(case)
    loaded = load_model(folder)
    with pytest.raises(ModelError, match="5 virtual tokens, which cannot be merged"):
        hf_tensors(loaded.module)
    with pytest.raises(ModelError, match=r"_TUNING, which does not change the base's weights"):
        MergedSource(open_weights(base)[1], folder)
    detach(loaded.module)
    np.testing.assert_array_equal(
        loaded.__class__(loaded.module, {}, base).logits(TOKENS), load_model(base).logits(TOKENS)
    )


def edit(folder, change=None, **fields):
    with open(f"{folder}/adapter_config.json", encoding="utf-8") as file:
        config = json.load(file) | fields
    with open(f"{folder}/adapter_config.json", "w", encoding="utf-8") as file:
        json.dump(config, file)
    if change is not None:
        path = f"{folder}/adapter_model.safetensors"
        save_file(change(load_file(path)), path)


def without(name):
    return lambda t: {key: value for key, value in t.items() if key != name}


def short(name):
    return lambda t: t | {name: t[name][:3].copy()}


LAMBDA = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b"
FACTORS = "base_model.model.model.layers.1.self_attn.k_proj.ia3_l"
DAMAGE = [
    ("vera", None, {"bias": "all"}, ModelError, "bias='all'"),
    ("vera", None, {"r": 0}, ModelError, "r=0; a rank is a whole number above zero"),
    ("vera", without("base_model.vera_A"), {}, CheckpointError, "missing base_model.vera_A"),
    ("vera", without(LAMBDA), {}, CheckpointError, "missing .*layers.0.*lambda_b"),
    ("vera", short(LAMBDA), {}, CheckpointError, r"misshapen .*file \[3\], model \[32\]"),
    ("vera", lambda t: t | {"extra": t[LAMBDA]}, {}, CheckpointError, "tensors name no layer"),
    ("ia3", None, {"feedforward_modules": []}, CheckpointError, r"misshapen .*down_proj.ia3_l: file \[1, 48\]"),
    ("ia3", None, {"modules_to_save": ["lm_head"]}, CheckpointError, "lm_head, which modules_to_save names, has no"),
    ("ia3", without(FACTORS), {}, CheckpointError, "missing .*layers.1.*k_proj.ia3_l"),
    ("prompt", None, {"num_virtual_tokens": 4}, CheckpointError, r"misshapen .*file \[5, 32\], model \[4, 32\]"),
    ("prompt", None, {"num_virtual_tokens": "5"}, ModelError, "num_virtual_tokens='5'; it is a whole number"),
    ("prompt", None, {"token_dim": 64}, ModelError, "belongs to another model: token_dim=64, the model has 32"),
    ("prompt", None, {"num_transformer_submodules": 2}, ModelError, "num_transformer_submodules=2"),
    ("prompt", lambda t: {"prompt": t["prompt_embeddings"]}, {}, CheckpointError, "missing prompt_embeddings"),
    ("prefix", None, {"num_attention_heads": 4}, ModelError, "num_attention_heads=4, the model has 2"),
    ("prefix", None, {"num_layers": 2}, ModelError, "num_layers=2, the model has 3"),
    ("prefix", lambda t: {k: v[:, :-1].copy() for k, v in t.items()}, {}, CheckpointError, r"misshapen .*\[5, 95\]"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "change", "fields", "error", "message"), DAMAGE, ids=[d[4] for d in DAMAGE])
def test_what_does_not_fit_is_refused(by_peft, case, change, fields, error, message):
    _, folder, _ = by_peft(case)
    edit(folder, change, **fields)
    with pytest.raises(error, match=message):
        load_model(folder)


MERGE_DAMAGE = [
    ("vera", without(LAMBDA), "q_proj.weight has lambda_d only"),
    ("vera", short(LAMBDA), r"lambda_b is \[3\], the base wants \[32\]"),
    ("vera", without("base_model.vera_B"), "lacks base_model.vera_A or"),
    ("vera", lambda t: t | {"base_model.vera_B": t["base_model.vera_B"][:4].copy()}, r"shared matrices are .*\[4, 6\]"),
    ("vera", lambda t: t | {"extra": t[LAMBDA]}, "extra names no linear layer"),
    ("ia3", lambda t: t | {FACTORS: t[FACTORS].T.copy()}, r"ia3_l is \[1, 16\], the base wants \[16, 1\]"),
    ("ia3", lambda t: t | {"extra": t[FACTORS]}, "extra names no linear layer"),
    ("ia3", lambda t: {}, "it holds no adapter at all"),
    ("vera", lambda t: {k: v for k, v in t.items() if "lambda" not in k}, "it holds no adapter at all"),
]


@pytest.mark.parametrize(("case", "change", "message"), MERGE_DAMAGE, ids=[d[2] for d in MERGE_DAMAGE])
def test_what_does_not_fit_is_not_merged(by_peft, case, change, message):
    _, folder, base = by_peft(case)
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        MergedSource(open_weights(base)[1], folder)


def test_two_kinds_in_one_model_are_no_peft_folder(by_peft, tmp_path):
    from jaxft.adapters.ia3 import attach_ia3

    _, folder, base = by_peft("prompt")
    loaded = load_model(folder)
    attach_ia3(loaded.module, ("q_proj",), ())
    with pytest.raises(ModelError, match="adapters of IA3 and PROMPT_TUNING: a PEFT folder holds one kind"):
        write_adapter(loaded.module, str(tmp_path / "both"), base=base)
