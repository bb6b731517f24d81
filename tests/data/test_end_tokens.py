"""Every end token that a model's files name, in and out."""

import json

import pytest

from jaxft.checkpoint.hf import write_config
from jaxft.data.tokenizers.end_tokens import with_end_tokens
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ModelError


def _write(folder, **files):
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def folder(tokenizer_of, tmp_path):
    """A tokenizer whose ids 0 to 4 are added tokens; its own end is 1, its template's 4."""
    tokenizer_of("llama3").save(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({"eos_token_id": [1, 2, 9]}, None, {1, 2, 4, 9}),
        ({"eos_token_id": 3}, {"temperature": 0.6}, {1, 3, 4}),
        ({"eos_token_id": [2, 3]}, {"eos_token_id": [1]}, {1, 2, 3, 4}),
        ({"eos_token_id": 9}, {"eos_token_id": [1]}, {1, 4}),  # 9 is a word: a default of another vocabulary
        ({"eos_token_id": None, "text_config": {"eos_token_id": [2, 3]}}, None, {1, 2, 3, 4}),
        ({"eos_token_id": [1], "text_config": {"eos_token_id": 2}}, None, {1, 4}),
        ({"eos_token_id": -1}, None, {1, 4}),
    ],
)
def test_ends_of_both_files_are_stop_tokens(folder, config, generation, ends):
    _write(folder, config=config)
    if generation is not None:
        _write(folder, generation_config=generation)
    assert load_tokenizer(folder).stop_ids == ends


def test_what_transformers_stops_at_is_among_them(folder):
    transformers = pytest.importorskip("transformers")
    for config, generation in (({"eos_token_id": [1, 2, 9]}, None), ({"eos_token_id": 2}, {"eos_token_id": [0, 3]})):
        _write(folder, config={"model_type": "llama"} | config)
        if generation is not None:
            _write(folder, generation_config=generation)
            theirs = transformers.GenerationConfig.from_pretrained(folder)
        else:
            theirs = transformers.GenerationConfig.from_model_config(transformers.AutoConfig.from_pretrained(folder))
        assert set(theirs.eos_token_id) <= load_tokenizer(folder).stop_ids


def test_ends_that_are_no_ids_are_refused(folder):
    _write(folder, config={"eos_token_id": "<|eot_id|>"})
    with pytest.raises(ModelError, match=r"eos_token_id='<\|eot_id\|>' is neither a token id nor a list of ids"):
        load_tokenizer(folder)


def test_an_adapter_folder_has_the_ends_of_its_base(folder, tmp_path):
    base = _write(folder, config={"eos_token_id": [1, 3]})
    adapter = tmp_path / "adapter"
    load_tokenizer(base).save(adapter)
    _write(adapter, adapter_config={"base_model_name_or_path": str(base)})
    assert load_tokenizer(adapter).stop_ids == {1, 3, 4}
    _write(adapter, adapter_config={"base_model_name_or_path": str(tmp_path / "gone")})
    assert load_tokenizer(adapter).stop_ids == {1, 4}


def test_what_is_written_names_every_end(folder, tmp_path):
    _write(folder, config={"eos_token_id": [1, 2, 9]})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.generation_config({"top_k": 3})["eos_token_id"] == [1, 2, 4, 9]
    # Another tokenizer does not make the model forget its own ends.
    assert tokenizer.generation_config({"eos_token_id": [0, 3]})["eos_token_id"] == [0, 1, 2, 3, 4, 9]
    assert with_end_tokens({"eos_token_id": 7, "top_k": 3}, {"eos_token_id": [7, 8], "bos_token_id": 0}) == {
        "bos_token_id": 0, "eos_token_id": [7, 8], "top_k": 3,
    }  # fmt: skip
    write_config(str(tmp_path), {"model_type": "llama", "eos_token_id": [5, 6]}, dtype="float32")
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"eos_token_id": [5, 6]}
