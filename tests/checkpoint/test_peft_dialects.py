"""Every form of PEFT folder that PEFT reads: merged and live it computes what PEFT computes, and is written back."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import models
from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import hf_config_of, load_model, open_merged
from jaxft.checkpoint.peft import write_adapter
from jaxft.data.tokenizers.table import table_rows
from jaxft.errors import CheckpointError, ModelError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOKENS = np.random.default_rng(0).integers(0, 90, (2, 12))
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q, BOTH = ["q_proj"], ["embed_tokens", "lm_head"]
# Settings of the adapter; `grow`: tokens by which the tables were resized first; `save`: of save_pretrained.
CASES = {
    "head saved": {"modules_to_save": ["lm_head"]},
    "embeddings saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": BOTH},
    "both saved and tied": {"modules_to_save": BOTH, "ensure_weight_tying": True},
    "norms saved": {"modules_to_save": ["norm"]},
    "lora on the head": {"target_modules": [*Q, "lm_head"]},
    "lora on the embeddings": {"target_modules": [*Q, "embed_tokens"]},
    "lora on both": {"target_modules": [*Q, *BOTH]},
    "lora on both, tied": {"target_modules": [*Q, "embed_tokens"], "ensure_weight_tying": True},
    "dora on the head": {"target_modules": [*Q, "lm_head"], "use_dora": True},
    "rows": {"trainable_token_indices": [5, 17, 9]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]}},
    "rows that differ": {"trainable_token_indices": {"embed_tokens": [5, 9, 17], "lm_head": [9, 5]}},
    "rows of the head": {"trainable_token_indices": {"lm_head": [5, 9]}},
    "rows alone": {"kind": "TrainableTokensConfig", "token_indices": [5, 17, 9]},
    "rows of both alone": {
        "kind": "TrainableTokensConfig",
        "token_indices": [5, 9],
        "target_modules": r".*(embed_tokens|lm_head)",
        "variant": "plain",
    },
    "tables beside": {"save": {"save_embedding_layers": True}},
    "grown": {"grow": 3},
    "shrunk": {"grow": -3},
    "grown, both saved": {"grow": 3, "modules_to_save": BOTH},
    "grown, head saved": {"grow": 3, "modules_to_save": ["lm_head"]},
    "grown, rows": {"grow": 3, "trainable_token_indices": [96, 97, 98]},
    "grown, lora on both": {"grow": 3, "target_modules": [*Q, *BOTH]},
    "biases": {"bias": "all", "variant": "biases"},
    "biases of the adapted": {"bias": "lora_only", "variant": "biases"},
    "a bias of B": {"lora_bias": True, "variant": "biases"},
}
# Where a base with two tables is no other case than any tensor of the base.
ONLY_TIED_QUICK = {
    "head saved", "embeddings saved", "both saved and tied", "lora on the embeddings", "lora on both, tied",
    "dora on the head", "rows of both", "rows of the head", "shrunk", "grown, both saved",
}  # fmt: skip
LIVE = ("lora on both", "rows that differ", "grown, rows", "a bias of B")


def torch_logits(model):
    with torch.no_grad():
        return model.eval().double()(torch.tensor(TOKENS)).logits.numpy()


def resized(model, rows, seed=0):
    torch.manual_seed(seed)
    if rows != model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(rows)
    return model


def by_peft(torch_llama, base, folder, *, grow=0, save=None, kind="LoraConfig", **settings):
    """A folder of PEFT's whose trained parameters were moved."""
    usual = {"r": 4, "lora_alpha": 8, "target_modules": Q} if kind == "LoraConfig" else {}
    settings = {"task_type": "CAUSAL_LM"} | usual | settings
    model = peft.get_peft_model(resized(torch_llama(base), 96 + grow), getattr(peft, kind)(**settings))
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder, **(save or {}))
    return model


def read_by_peft(torch_llama, base, folder, grow=0):
    # Another draw of the new rows: those of the folder must replace it.
    model = resized(torch_llama(base), 96 + grow, seed=9)
    return torch_logits(peft.PeftModel.from_pretrained(model, folder))


def merged_logits(folder):
    """transformers on the merged tensors, as a folder of the merged config would hold them."""
    hf_config, source, _ = open_merged(str(folder))
    config = models.config_from_hf(hf_config)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config))
    assert model.get_input_embeddings().num_embeddings == config.vocab_size == hf_config_of(str(folder))["vocab_size"]
    state = {name: torch.from_numpy(source.read(name)) for name in source.specs()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    assert not missing or config.tie_word_embeddings
    return torch_logits(model), {name: value.numpy() for name, value in state.items()}


def cases():
    for name, settings in CASES.items():
        yield pytest.param(
            name, False, marks=[pytest.mark.slow] if name in ONLY_TIED_QUICK else [], id=f"{name}-untied"
        )
        if "variant" not in settings:
            yield pytest.param(name, True, id=f"{name}-tied")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "tied"), [*cases()])
def test_what_peft_reads_is_read(tiny_llama, torch_llama, tmp_path, name, tied):
    settings = dict(CASES[name])
    variant = settings.pop("variant", "plain")
    base, grow, theirs = tiny_llama("tied" if tied else variant), settings.get("grow", 0), tmp_path / "theirs"
    by_peft(torch_llama, base, theirs, **settings)
    expected = read_by_peft(torch_llama, base, theirs, grow)
    size = np.abs(expected).max()
    logits, tensors = merged_logits(theirs)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-6 * size)
    loaded = load_model(str(theirs))
    # The same in memory.
    live = {key: make() for key, (_, make) in hf_tensors(loaded.module).items()}
    for key, value in live.items():
        np.testing.assert_allclose(value, tensors[key], rtol=0, atol=1e-5, err_msg=key)
    assert set(live) == set(tensors)
    if name in LIVE:
        np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=5e-6 * size)
    # Written again, for PEFT and for us.
    ours = tmp_path / "ours"
    write_adapter(loaded.module, str(ours), base=base)
    np.testing.assert_allclose(read_by_peft(torch_llama, base, ours, grow), expected, rtol=0, atol=1e-6 * size)
    np.testing.assert_allclose(merged_logits(ours)[0], logits, rtol=0, atol=1e-6 * size)


@pytest.mark.filterwarnings("ignore")
def test_tokens_of_a_resized_table_have_rows(tiny_llama, torch_llama, tmp_path):
    for grow, settings in enumerate(({}, {"trainable_token_indices": [96]}, {"target_modules": ["lm_head"]}), start=1):
        by_peft(torch_llama, tiny_llama("tied"), tmp_path / str(grow), grow=grow, **settings)
        assert table_rows(str(tmp_path / str(grow))) == 96 + grow
    by_peft(torch_llama, tiny_llama("tied"), tmp_path / "same", grow=0)
    assert table_rows(str(tmp_path / "same")) == 96


@pytest.mark.filterwarnings("ignore")
def test_dora_on_the_embeddings_is_merged(tiny_llama, torch_llama, tmp_path):
    base = tiny_llama("plain")
    by_peft(torch_llama, base, tmp_path, use_dora=True, target_modules=["q_proj", "embed_tokens"])
    expected = read_by_peft(torch_llama, base, tmp_path)
    np.testing.assert_allclose(merged_logits(tmp_path)[0], expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    loaded = load_model(str(tmp_path))
    assert loaded.adapter is None, "it is merged"
    np.testing.assert_allclose(loaded.logits(TOKENS), expected, rtol=0, atol=5e-6 * np.abs(expected).max())


@pytest.fixture(scope="module")
def plain_folder(tiny_llama, torch_llama, tmp_path_factory):
    """A folder of PEFT's with DoRA on two layers and a saved norm, and what its model computes merged."""
    folder = tmp_path_factory.mktemp("plain")
    by_peft(
        torch_llama, tiny_llama("plain"), folder, use_dora=True, target_modules=["q_proj", "embed_tokens"][:1],
        modules_to_save=["model.norm"],
    )  # fmt: skip
    return folder, merged_logits(folder)[0]


def renamed(folder, to, rename):
    shutil.copytree(folder, to)
    tensors = {new: value for key, value in load_file(to / WEIGHTS).items() for new in rename(key)}
    save_file(tensors, to / WEIGHTS)
    return to


def with_name(name):
    def rename(key):
        if "magnitude" in key:
            return [f"{key}.{name}.weight"]
        return [key.replace(".weight", f".{name}.weight").replace("norm.", "norm.modules_to_save.")]

    return rename


SPELLINGS = {
    "the adapter's name": with_name("default"),
    "another name": with_name("sft-2"),
    "a weight of DoRA's lengths": lambda key: [f"{key}.weight" if "magnitude" in key else key],
    "the name at DoRA's lengths": lambda key: [f"{key}.default" if "magnitude" in key else key],
    "saved modules as they are wrapped": lambda key: [
        key.replace("norm.weight", "norm.modules_to_save.default.weight")
    ],
    "the tensor before training": lambda key: (
        [key.replace("norm.weight", "norm.modules_to_save.weight"), key.replace("norm", "norm.original_module")]
        if "norm" in key
        else [key]
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_keys(plain_folder, tmp_path, name):
    folder, expected = plain_folder
    np.testing.assert_array_equal(merged_logits(renamed(folder, tmp_path / "new", SPELLINGS[name]))[0], expected)


def test_two_adapters_in_one_file_are_refused(plain_folder, tmp_path):
    folder = renamed(plain_folder[0], tmp_path / "two", lambda key: [*with_name("a")(key), *with_name("b")(key)])
    with pytest.raises(CheckpointError, match=r"tensors of 2 adapters, a, b: keep one of them"):
        load_model(str(folder))


def edited(folder, to, **fields):
    shutil.copytree(folder, to)
    config = json.loads((to / CONFIG).read_text())
    (to / CONFIG).write_text(json.dumps(config | fields))
    return str(to)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        *(
            ({"init_lora_weights": init}, "path_initial_model_for_weight_conversion")
            for init in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq")
        ),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers of the base.*merge_and_unload"),
        ({"use_qalora": True}, "use_qalora=True.*groups of a layer's inputs"),
        ({"alora_invocation_tokens": [3, 4]}, "switched on behind these tokens"),
        ({"arrow_config": {"top_k": 3}}, "chooses among other adapters"),
        ({"megatron_config": {"a": 1}}, "megatron_config.*merge_and_unload"),
        ({"use_bdlora": {"nblocks": 2}}, "block diagonal"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"monteclora_config": {"num_samples": 2}}, "samples the weights"),
        ({"velora_config": {"scale": 1}}, "velora_config"),
        ({"trainable_token_indices": "5"}, "needs token ids"),
        ({"peft_type": None, "fine_tune_type": "lora"}, "implemented"),
    ],
)
def test_settings_that_are_refused_say_why(plain_folder, tmp_path, fields, match):
    with pytest.raises(ModelError, match=match):
        load_model(edited(plain_folder[0], tmp_path / "new", **fields))


def test_settings_without_an_effect_are_read(plain_folder, tmp_path):
    fields = {"fan_in_fan_out": True, "merge_weights": False, "enable_lora": None, "auto_mapping": {"unsloth_fixed": 1}}
    folder = edited(plain_folder[0], tmp_path / "new", **fields)
    np.testing.assert_array_equal(merged_logits(folder)[0], plain_folder[1])


def test_an_adapter_of_mlx_is_named(tmp_path):
    (tmp_path / CONFIG).write_text(json.dumps({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}))
    with pytest.raises(ModelError, match=r"an adapter of MLX, not of PEFT.*mlx_lm\.fuse"):
        load_model(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_one_of_two_resized_tables_is_refused_and_the_mend_works(tiny_llama, torch_llama, tmp_path):
    base, folder, grown = tiny_llama("plain"), tmp_path / "adapter", tmp_path / "grown"
    by_peft(torch_llama, base, folder, grow=3, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(CheckpointError, match=r"holds only one of them.*99 rows and lm_head.weight 96.*--base=FOLDER"):
        load_model(str(folder))
    resized(torch_llama(base), 99).save_pretrained(grown)
    loaded = load_model(str(folder), base=str(grown))
    assert (loaded.base, loaded.module.config.vocab_size) == (str(grown), 99)


@pytest.mark.filterwarnings("ignore")
def test_other_values_than_the_bases_are_told(tiny_llama, torch_llama, tmp_path):
    base = tiny_llama("plain")
    by_peft(torch_llama, base, tmp_path, save={"save_embedding_layers": True})
    assert load_model(str(tmp_path)).notes == ()
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    save_file(tensors, tmp_path / WEIGHTS)
    (note,) = load_model(str(tmp_path)).notes
    assert "other values of lm_head.weight than its base" in note
    np.testing.assert_allclose(merged_logits(tmp_path)[0], read_by_peft(torch_llama, base, tmp_path), rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", [None, "C:\\models\\llama", "/mnt/train/unsloth/llama-bnb-4bit"])
def test_the_base_may_be_elsewhere(plain_folder, tiny_llama, tmp_path, named):
    folder = edited(plain_folder[0], tmp_path / "moved", base_model_name_or_path=named)
    with pytest.raises(CheckpointError, match=r"--base \(in a config: model\.base\)"):
        load_model(folder)
    assert load_model(folder, base=tiny_llama("plain")).base == tiny_llama("plain")
    with pytest.raises(CheckpointError, match="misshapen|unexpected|does not fit|fit config"):
        load_model(folder, base=tiny_llama("wide_heads"))
    with pytest.raises(ModelError, match="is not a PEFT folder, so it has no base"):
        load_model(tiny_llama("plain"), base=folder)
