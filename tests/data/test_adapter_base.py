"""The base that a PEFT folder names, for all who read it: weights, tokenizer, end tokens and rows of the table."""

import json

import pytest

from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.adapter_base import CONFIG, base_of, base_revision, known_base

ELSEWHERE = "/mnt/train/unsloth/llama-bnb-4bit"


@pytest.fixture
def folder_of(tokenizer_of, tmp_path):
    def save(name):
        tokenizer_of("chatml").save(tmp_path / name)
        return tmp_path / name

    return save


def adapter(folder, **fields):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA"} | fields))
    return folder


def test_a_base_beside_the_adapter_is_found_by_everyone(folder_of, tmp_path):
    base = folder_of("base")
    (base / "config.json").write_text(json.dumps({"vocab_size": 321, "eos_token_id": [1, 2]}))
    named_by_folder = adapter(base.parent / "adapter", base_model_name_or_path="../base")
    assert base_of(str(named_by_folder)) == str(base)
    expected = load_tokenizer(base)
    for tokenizer in (
        load_tokenizer(named_by_folder),
        load_tokenizer(adapter(tmp_path / "moved", base_model_name_or_path=ELSEWHERE), base=str(base)),
    ):
        assert tokenizer.encode("Hello there") == expected.encode("Hello there")
        assert tokenizer.stop_ids == expected.stop_ids and {1, 2} <= tokenizer.stop_ids
        assert tokenizer.table_rows == 321


def test_an_adapter_with_a_tokenizer_of_its_own_has_the_end_tokens_of_the_given_base(folder_of, tmp_path):
    base, own = folder_of("base"), folder_of("own")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    (base / "config.json").write_text(json.dumps({"vocab_size": 321}))
    adapter(own, base_model_name_or_path=ELSEWHERE)
    tokenizer = load_tokenizer(own, base=str(base))
    assert {1, 2} <= tokenizer.stop_ids and tokenizer.table_rows == 321
    assert known_base(str(own)) is None  # told where the model is loaded
    assert load_tokenizer(own).table_rows is None


@pytest.mark.parametrize("named", [ELSEWHERE, "C:\\models\\llama", None, 5])
def test_a_base_that_is_not_there_is_said_with_the_flag_that_names_it(tmp_path, named):
    folder = adapter(tmp_path / "adapter", base_model_name_or_path=named)
    for read in (base_of, load_tokenizer):
        with pytest.raises(CheckpointError, match=r"Give the folder that holds it, or owner/name .* with --base"):
            read(str(folder))


def test_an_adapter_of_mlx_is_named_where_its_tokenizer_is_read(tmp_path):
    tmp_path.joinpath(CONFIG).write_text(json.dumps({"fine_tune_type": "lora"}))
    with pytest.raises(ModelError, match=r"an adapter of MLX, not of PEFT.*mlx_lm\.fuse"):
        load_tokenizer(tmp_path)


def test_names_on_the_hub_and_their_revision(tmp_path):
    folder = str(adapter(tmp_path / "adapter", base_model_name_or_path="owner/name", revision="v2"))
    assert base_of(folder) == "hf://owner/name" and base_revision(folder, "hf://owner/name") == "v2"
    assert known_base(folder) == ("hf://owner/name", "v2")
    # The revision is that of the name in the file.
    assert base_of(folder, "other/name") == "hf://other/name"
    assert base_revision(folder, "hf://other/name", "other/name") is None


def test_adapters_that_are_each_others_base_are_refused(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    adapter(one, base_model_name_or_path=str(two))
    adapter(two, base_model_name_or_path="../one")
    alone = adapter(tmp_path / "alone", base_model_name_or_path="../alone")
    for folder in (one, two, alone):
        with pytest.raises(CheckpointError, match=r"adapters name each other, .*--base"):
            base_of(str(folder))
        assert known_base(str(folder)) is None
