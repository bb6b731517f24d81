"""Reward models on disk: whole, merged and as adapters they give the same scores in transformers and PEFT."""

import json

import jax
import numpy as np
import pytest

from jaxft import api
from jaxft.adapters.attach import adapters
from jaxft.assets import ASSETS
from jaxft.checkpoint.hf import write_config, write_weights
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.verify import score_probe
from jaxft.config import AdapterConfig
from jaxft.data.tokenizers.padding import separate_pad_id, with_separate_pad
from jaxft.errors import DataError, ExportError, ModelError
from jaxft.runs.build import attach_adapter
from jaxft.runs.export import write

DOCUMENTS = [[5, 9, 44, 2], [7, 2], [31, 0, 12, 88, 6, 2], [0, 0, 3, 2, 2]]


@pytest.fixture(scope="module")
def tokenizer():
    return api.load_tokenizer(str(ASSETS / "smoke"))


def trained(folder, kind, **options):
    """A reward model as if trained."""
    loaded = load_model(folder, head="score", **options)
    if kind != "none":
        attach_adapter(loaded.module, AdapterConfig(r=4, kind=kind), 0)
    for index, adapter in enumerate(adapters(loaded.module).values()):
        adapter.lora_b.set_value(0.1 * jax.random.normal(jax.random.key(index), adapter.lora_b.get_value().shape))
    loaded.module.value.weight.set_value(jax.random.normal(jax.random.key(7), (32,)))
    return loaded


def scores_of(model, pad):
    """transformers' scores of the documents in one padded batch."""
    torch = pytest.importorskip("torch")
    longest = max(map(len, DOCUMENTS))
    rows = torch.tensor([[*d, *[pad] * (longest - len(d))] for d in DOCUMENTS])
    mask = torch.tensor([[1] * len(d) + [0] * (longest - len(d)) for d in DOCUMENTS])
    with torch.no_grad():
        return model.eval()(rows, attention_mask=mask).logits[:, 0].numpy()


def theirs(folder, **options):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype="float32", **options)


@pytest.mark.parametrize(("variant", "kind"), [("plain", "none"), ("tied", "lora")])
def test_a_whole_reward_model_is_written_and_read(tiny_llama, tokenizer, tmp_path, variant, kind):
    """Also merged, whether or not the base's head is tied; the file has no LM head."""
    loaded = trained(tiny_llama(variant), kind)
    checks = write(loaded, tokenizer, tmp_path, format="merged")
    assert [check.reader for check in checks] == ["jaxft", "transformers"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"} and config["label2id"] == {"LABEL_0": 0}
    assert config["pad_token_id"] == separate_pad_id(tokenizer) and config["eos_token_id"] == tokenizer.eos_id
    expected = loaded.scores(DOCUMENTS)
    np.testing.assert_allclose(scores_of(theirs(tmp_path), config["pad_token_id"]), expected, rtol=0, atol=1e-5)
    again = load_model(str(tmp_path))
    np.testing.assert_allclose(again.scores(DOCUMENTS), expected, rtol=0, atol=1e-5)
    assert again.module.lm_head is None and not again.module.tied


def test_an_adapter_is_written_for_peft_and_read_with_its_score_head(tiny_llama, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    loaded = trained(tiny_llama("plain"), "lora")
    checks = write(loaded, tokenizer, tmp_path / "ours", format="adapter")
    assert [check.reader for check in checks] == ["jaxft", "peft"]
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS" and config["modules_to_save"] == ["score"]
    base = theirs(tiny_llama("plain"), num_labels=1)  # draws a head, which the adapter's replaces
    base.config.pad_token_id = separate_pad_id(tokenizer)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    expected = loaded.scores(DOCUMENTS)
    np.testing.assert_allclose(scores_of(model, base.config.pad_token_id), expected, rtol=0, atol=1e-5)
    # What PEFT writes names the heads of other families too.
    model.save_pretrained(tmp_path / "theirs")
    assert "classifier" in json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["modules_to_save"]
    for folder in ("ours", "theirs"):
        np.testing.assert_allclose(load_model(str(tmp_path / folder)).scores(DOCUMENTS), expected, rtol=0, atol=1e-5)


def test_a_score_head_stays_float32_in_a_narrower_model(tiny_llama):
    module = load_model(tiny_llama("plain"), head="score", dtype="bfloat16", quantization="int8").module
    assert module.value.weight.get_value().dtype == np.float32
    assert load_model(tiny_llama("plain"), head="score").scores(DOCUMENTS).tolist() == [0.0] * 4


def test_an_export_with_another_score_head_is_refused(tiny_llama, tokenizer, tmp_path, monkeypatch):
    from jaxft.checkpoint import verify

    monkeypatch.setattr(verify, "PEER_LIMIT", 0)
    loaded = trained(tiny_llama("plain"), "none")
    weight = loaded.module.value.weight
    other = load_model(tiny_llama("plain"), head="score")
    other.module.value.weight.set_value(weight.get_value() * 1.01)
    write_weights(other.module, str(tmp_path))
    write_config(str(tmp_path), loaded.hf_config, dtype="float32")
    with pytest.raises(ExportError, match="differs from the live model: scores by"):
        verify.check_export(loaded, str(tmp_path), dtype="float32")


def test_the_documents_of_a_check_end_in_the_end_token():
    documents = score_probe({"vocab_size": 96, "eos_token_id": [2, 3]})
    assert {document[-1] for document in documents} == {2} and len({*map(len, documents)}) == len(documents)


def test_a_classifier_is_refused(tiny_llama, tmp_path):
    loaded = load_model(tiny_llama("tied"), head="score")
    write_weights(loaded.module, str(tmp_path))
    labels = {"id2label": {str(i): f"LABEL_{i}" for i in range(3)}}
    write_config(str(tmp_path), loaded.hf_config | labels, dtype="float32")
    with pytest.raises(ModelError, match="a LlamaForSequenceClassification with 3 labels, a classifier"):
        load_model(str(tmp_path))


def test_padding_is_no_end_token(tokenizer):
    """transformers would read the score one token before the end."""
    apart = with_separate_pad(tokenizer)
    assert apart.pad_id == tokenizer.pad_id and apart.pad_id not in apart.stop_ids
    ends = api.load_tokenizer(str(ASSETS / "smoke"))
    ends.backend.pad_token = ends.token(ends.eos_id)
    apart = with_separate_pad(ends)
    assert apart.pad_id not in apart.stop_ids and ends.backend.pad_token_id == ends.eos_id
    ends.stop_ids = frozenset(ends.backend.added_tokens_decoder)
    with pytest.raises(DataError, match="has no special token that could pad: all of them end an answer"):
        separate_pad_id(ends)
