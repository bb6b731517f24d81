"""Every field of config.json with values of every wrong kind: read, or refused by a ModelError that names the field."""

import json
import warnings

import pytest

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.errors import ModelError
from jaxft.models.field_kinds import KINDS
from jaxft.models.hf_fields import with_allowed
from jaxft.models.tensor_map import tensor_names

CONFIGS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ASSETS / "published").glob("*.json")}
FORMS = {hf["model_type"]: hf for hf in CONFIGS.values()}
WRONG = (
    "64", "</s>", "", 64.0, 0.5, float("nan"), float("inf"), 1e308, -1, 0, 10**12, 10**400, True, False, None, [],
    ["x"], [10**12], [None], {}, {"a": 1}, {"rope_type": ["x"]}, [{"a": 1}],
)  # fmt: skip


def variants(value):
    """The wrong values in the place of a value, and in the place of each of the values inside it."""
    yield from WRONG
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from ({**value, name: other} for other in variants(inner))
    if isinstance(value, list) and value:
        yield from ([*value[:-1], other] for other in WRONG)


@pytest.mark.parametrize("kind", sorted(FORMS))
def test_no_value_of_a_field_ends_in_another_error_than_ours(kind):
    # An absent field is tried too: files of other versions may have it.
    fields = {**dict.fromkeys(KINDS), "rope_theta": 1e4, "quantization_config": None, "dense_tensors": 1}
    form = fields | {name: value for name, value in FORMS[kind].items() if name != "model_type"}
    form |= {"num_hidden_layers": 2, "layer_types": None, "model_type": kind}
    refused, others = 0, []
    for name, right in form.items():
        for wrong in variants(right):
            try:
                config = models.config_from_hf(with_allowed({**form, name: wrong}, ()))
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    config.shape(), tensor_names(config.tensors(), config.num_hidden_layers), config.to_hf()
            except ModelError:
                refused += 1
            except Exception as error:
                others.append(f"{name}={wrong!r}: {type(error).__name__}: {error}")
    assert not others, "\n".join(others)
    assert refused > 10 * len(form)


@pytest.mark.parametrize(
    ("field", "wrong", "must_be"),
    [
        ("hidden_size", "64", "a whole number"),
        ("hidden_size", 64.0, "a whole number"),
        ("num_hidden_layers", -1, "a whole number"),
        ("vocab_size", 10**12, "at most 2147483647"),
        ("rms_norm_eps", float("nan"), "a finite number above zero"),
        ("tie_word_embeddings", "false", "true or false"),
        ("architectures", "LlamaForCausalLM", "a list of texts"),
        ("rope_scaling", "linear", "an object"),
        ("eos_token_id", "</s>", "a token id, or a list of ids"),
        ("eos_token_id", [10**12], "a token id, or a list of ids"),
    ],
)
def test_a_wrong_kind_is_refused_by_field_value_and_what_is_expected(field, wrong, must_be):
    with pytest.raises(ModelError) as refusal:
        models.config_from_hf({**FORMS["llama"], field: wrong})
    assert f"config.json: {field}={wrong!r} must be" in str(refusal.value) and must_be in str(refusal.value)


def test_a_file_cannot_allow_its_own_unknown_fields():
    strange = {**FORMS["llama"], "new_kind_of_scaling": 2.0, "allow_unknown": ["new_kind_of_scaling"]}
    with pytest.raises(ModelError, match="new_kind_of_scaling"):
        models.config_from_hf(with_allowed(strange, ()))
    assert models.config_from_hf(with_allowed(strange, ["new_kind_of_scaling"])).head == "vocabulary"
