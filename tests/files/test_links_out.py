"""A link out of a model folder is refused in every reader, before the file behind it is read."""

import json
import os
import shutil

import pytest

from jaxft import models
from jaxft.checkpoint import hf, orbax_folder
from jaxft.checkpoint.folders.opening import open_weights
from jaxft.data.tokenizers.end_tokens import end_tokens_at
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.table import table_rows
from jaxft.errors import CheckpointError, JaxftError
from jaxft.files.companions import copy_companions
from jaxft.files.gguf.header import part_files
from jaxft.files.paths import check_links, open_folder, read_json

LINKED = "is a link to .*outside.*Copy the file into the folder"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, smoke_config):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    model = models.random_model(models.config_from_hf(smoke_config), seed=0)
    hf.write_weights(model, str(folder))
    hf.write_config(str(folder), smoke_config, dtype="float32", generation={"eos_token_id": 1})
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0, "</s>": 1}, merges=[]))
    backend = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    backend.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    backend.save_pretrained(folder)
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("config.json", lambda folder, out: open_weights(folder)),
        ("generation_config.json", lambda folder, out: open_weights(folder)),
        ("generation_config.json", lambda folder, out: end_tokens_at(folder, None, lambda token: True)),
        ("model.safetensors", lambda folder, out: open_weights(folder)),
        ("tokenizer.json", lambda folder, out: load_tokenizer(folder)),
        ("tokenizer_config.json", lambda folder, out: load_tokenizer(folder)),
        ("chat_template.jinja", lambda folder, out: load_tokenizer(folder)),
        ("LICENSE", copy_companions),
    ],
)
def test_a_link_out_of_a_model_folder_is_refused(model_folder, tmp_path, name, read):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    read(str(folder), str(tmp_path))
    (tmp_path / "secret").write_bytes((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(JaxftError, match=LINKED):
        read(str(folder), str(tmp_path / "out"))
    (folder / "inner").mkdir()
    shutil.move(tmp_path / "secret", folder / "inner" / "secret")
    (folder / name).unlink()
    (folder / name).symlink_to("inner/secret")
    read(str(folder), str(tmp_path / "out"))  # a link within the folder is followed


def test_adapters_parts_and_arrays_are_checked_too(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.write_text("{}")
    (folder / "params").mkdir(parents=True)
    for name in ("adapter_config.json", "a-00002-of-00002.gguf", "params/.zarray"):
        (folder / name).symlink_to(outside)
    (folder / "a-00001-of-00002.gguf").touch()
    with pytest.raises(CheckpointError, match=LINKED):
        read_json(str(folder / "adapter_config.json"))
    with pytest.raises(CheckpointError, match=LINKED):
        part_files(str(folder / "a-00001-of-00002.gguf"), 2)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=LINKED):
        orbax_folder.OrbaxFolder(folder)
    with pytest.raises(CheckpointError, match=LINKED):
        check_links(str(folder))


def test_the_table_of_an_adapter_is_not_read_through_a_link(tmp_path):
    (tmp_path / "outside").write_bytes(b"x" * 100)
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "nowhere"}))
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=LINKED):
        table_rows(str(folder), None)


def test_a_snapshot_of_the_cache_may_link_to_its_blobs(tmp_path):
    entry = tmp_path / "models--owner--name"
    snapshot = entry / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    (entry / "blobs" / "feed").write_text("{}")
    os.symlink("../../blobs/feed", snapshot / "config.json")
    check_links(str(snapshot))
    assert read_json(str(snapshot / "config.json")) == {}
    assert open_folder(str(snapshot)).size("config.json") == 2
