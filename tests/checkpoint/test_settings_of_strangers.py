"""Settings in files of others with values of every wrong kind: read, or refused by an error of ours, never another."""

import itertools
import json
import shutil

import pytest

from jaxft.adapters.ia3 import attach_ia3
from jaxft.checkpoint.load import open_weights, random_model
from jaxft.checkpoint.merged import MergedSource
from jaxft.checkpoint.peft import write_adapter
from jaxft.checkpoint.quantized import dialects
from jaxft.config import AdapterConfig
from jaxft.data.tokenizers.end_tokens import end_tokens
from jaxft.errors import JaxftError, ModelError
from jaxft.runs.build import attach_adapter

WRONG = (
    "64", "(", "", 64.0, 0.5, -1, 0, 10**12, True, False, None, [], ["x"], ["("], [10**12], [None], {}, {"a": 1},
    {"a": None}, {"(": 4}, [{"a": 1}],
)  # fmt: skip
METHODS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq", "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "sparsity_config": {"format": "dense"},
        "config_groups": {"group_0": {"format": None, "weights": {"type": "float", "block_structure": "128x128"}}},
        "transform_config": {},
    },
}  # fmt: skip


def variants(value):
    """The wrong values in the place of a value, and in the place of each of the values inside it."""
    yield from WRONG
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from ({**value, name: other} for other in variants(inner))


class NoTensors:
    """A source of nothing, so that only settings can be at fault."""

    def specs(self):
        return {}


@pytest.mark.parametrize("method", METHODS)
def test_settings_of_quantised_folders(method):
    refused = 0
    for wrong in variants(METHODS[method]):
        try:
            settings = dialects.quantization_of({"quantization_config": wrong}, "folder")
            dialects.dequantized(settings, NoTensors())
        except JaxftError:
            refused += 1
    assert refused > len(WRONG)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """(kind -> a PEFT folder of the kind on the tiny base, the base's folder)."""
    from jaxft.assets import ASSETS
    from jaxft.checkpoint import hf

    base = tmp_path_factory.mktemp("base")
    drawn = random_model(str(ASSETS / "smoke"), seed=0, dtype="float32", param_dtype="float32")
    hf.write_weights(drawn.module, str(base))
    hf.write_config(str(base), drawn.hf_config, dtype="float32")
    folders = {}
    for kind in ("lora", "ia3"):
        model = random_model(str(ASSETS / "smoke"), seed=0, dtype="float32", param_dtype="float32").module
        if kind == "lora":
            attach_adapter(model, AdapterConfig(r=4), seed=0)
        else:
            attach_ia3(model, ("q_proj", "down_proj"), ("down_proj",))
        folders[kind] = str(tmp_path_factory.mktemp(kind) / "adapter")
        write_adapter(model, folders[kind], base=str(base))
    return folders, str(base)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_settings_of_adapters(adapted, tmp_path, kind):
    folders, base = adapted
    folder = shutil.copytree(folders[kind], tmp_path / "adapter")
    given = json.loads((folder / "adapter_config.json").read_text())
    weights, hf_config = open_weights(base)[1], open_weights(base)[0]
    refused = 0
    for name, wrong in itertools.product(given, WRONG):
        (folder / "adapter_config.json").write_text(json.dumps({**given, name: wrong}))
        try:
            MergedSource(weights, str(folder), hf_config)
        except JaxftError:
            refused += 1
    assert refused > len(given)


@pytest.mark.parametrize("wrong", ["</s>", ["x"], 10**12, [10**12], 2.0, True, {"a": 1}])
def test_end_tokens_are_ids(wrong, tmp_path):
    with pytest.raises(ModelError, match="eos_token_id=.* is neither a token id nor a list of ids"):
        end_tokens({"eos_token_id": wrong})
