"""Real models at their full size, without memory: every tensor's name and shape, and the published totals."""

import json
import math

import pytest

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.checkpoint.hf import hf_shape, param_tensors
from jaxft.nn.stack import group_layers
from jaxft.trees import flatten

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
revert_weight_conversion = pytest.importorskip("transformers.core_model_loading").revert_weight_conversion

CONFIGS = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((ASSETS / "published").glob("*.json"))
}
# Parameters as the authors' model cards or weight files count them, tied embeddings once.
TOTALS = {
    "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-3.3-70b": 70_553_706_496,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552, "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360, "qwen3-32b": 32_762_123_264,
    "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "smollm3-3b": 3_075_098_624,
    "seed-oss-36b": 36_151_104_512, "glm-4-9b": 9_399_951_360,
    "gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "gemma-2-27b": 27_227_128_320,
    "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952,
    # Without the image tower and its projection, which the cards count too.
    "gemma-3-4b-text": 3_880_263_168, "gemma-3-12b-text": 11_766_034_176, "gemma-3-27b-text": 27_009_346_304,
    "phi-3-mini-4k": 3_821_079_552, "phi-4": 14_659_507_200, "phi-4-mini": 3_836_021_760,
    "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624, "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672,
    # Likewise; the cards round them to 3.4, 8.4 and 13.5 billion.
    "ministral-3-3b-text": 3_429_006_336, "ministral-3-8b-text": 8_489_553_920,
    "ministral-3-14b-text": 13_506_073_600,
    "olmo-2-7b": 7_298_617_344, "olmo-2-13b": 13_716_198_400,
    "olmo-3-7b": 7_298_011_136, "olmo-3-32b": 32_233_522_176,
}  # fmt: skip


def test_every_family_has_a_published_model():
    assert {hf["model_type"] for hf in CONFIGS.values()} >= set(models.families())
    assert set(TOTALS) <= set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_has_transformers_name_and_shape(name):
    hf = CONFIGS[name]
    model = models.abstract_model(models.config_from_hf(hf))
    leaves = flatten(model)[0]
    ours = {
        piece.hf: hf_shape(placed, piece, leaves[path].shape)
        for path, placed in param_tensors(model).items()
        for piece in placed.pieces
    }
    fields = {k: v for k, v in hf.items() if k not in ("auto_map", "model_type")}
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(hf["model_type"], **fields)
        )
        # As files have them: transformers 5 keeps the experts of a layer in one tensor, its files do not.
        # Buffers too, but a tied head only once.
        tensors = dict(theirs.named_parameters()) | {
            n: x for n, x in theirs.named_buffers() if n in theirs.state_dict()
        }
        saved = revert_weight_conversion(theirs, tensors)
    assert {model.config.in_files(name): shape for name, shape in ours.items()} == {
        key: tuple(parameter.shape) for key, parameter in saved.items()
    }
    total = models.parameter_count(model)
    assert total == sum(map(math.prod, ours.values())) == TOTALS.get(name, total)


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("llama-3.1-405b", [126]),
        ("gemma-2-27b", [23, 23]),
        # Five local layers and a global one, as often as they fit; then the local ones that remain.
        ("gemma-3-27b-text", [10] * 6 + [2]),
        # Here a stack for each run is as few.
        ("gemma-3-270m", [5, 1] * 3),
    ],
)
def test_equal_layers_are_stacked(name, stacks):
    model = models.abstract_model(models.config_from_hf(CONFIGS[name]))
    assert [len(group) for group in group_layers(model.segments)] == stacks


def test_windows_bound_the_cache_of_real_models():
    model = models.abstract_model(models.config_from_hf(CONFIGS["gemma-3-1b"]))
    assert sorted({part.slots for part in model.init_cache(1, 2048)}) == [512, 2048]
