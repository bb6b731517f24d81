"""One way to files here, in the Hugging Face cache and in buckets: stand-ins for hub and bucket."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxft import cli
from jaxft.adapters.attach import adapters
from jaxft.assets import ASSETS
from jaxft.checkpoint.load import load_model, open_weights
from jaxft.checkpoint.peft import write_adapter
from jaxft.checkpoint.tensors import SafetensorsFolder
from jaxft.checkpoint.verify import check_export
from jaxft.config import AdapterConfig
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import CheckpointError, ModelError
from jaxft.files.hub import HubPath, fetch_hub, hub_path
from jaxft.files.paths import (
    RemoteFolder,
    copy_small_files,
    hub_hint,
    open_folder,
    read_json,
    sizes_and_times,
)
from jaxft.runs.build import attach_adapter

TOKENS = np.arange(12).reshape(1, 12)


@pytest.fixture
def bucket(tiny_llama):
    """memory://bucket/model: the files of a model in fsspec's memory filesystem."""
    files = fsspec.filesystem("memory")
    folder = Path(tiny_llama("plain"))
    for file in folder.iterdir():
        files.pipe_file(f"/bucket/model/{file.name}", file.read_bytes())
    yield "memory://bucket/model"
    files.rm("/bucket", recursive=True)


def test_a_model_in_a_bucket_is_the_model_on_disk(tiny_llama, bucket):
    np.testing.assert_array_equal(load_model(bucket).logits(TOKENS), load_model(tiny_llama("plain")).logits(TOKENS))


def test_only_the_bytes_of_a_block_travel(tiny_llama, bucket, monkeypatch):
    source, local = SafetensorsFolder(bucket), SafetensorsFolder(tiny_llama("plain"))
    files, asked = fsspec.filesystem("memory"), []
    cat_file = type(files).cat_file
    monkeypatch.setattr(
        type(files),
        "cat_file",
        lambda self, path, start, end: asked.append(end - start) or cat_file(self, path, start, end),
    )
    name = "model.layers.1.mlp.up_proj.weight"
    for index in [(slice(3, 9),), (slice(3, 9), slice(4, 20)), (slice(0, 0),)]:
        asked.clear()
        block = source.read(name, index)
        np.testing.assert_array_equal(block, local.read(name, index))
        rows, width = index[0].stop - index[0].start, 32 * 4
        assert sum(asked) <= rows * width, "no more than whole rows"
        assert len(asked) <= 1, "rows that lie close together travel as one request"


def test_far_ranges_travel_apart_and_short_files_are_noticed(bucket):
    files = fsspec.filesystem("memory")
    files.pipe_file("/bucket/model/big", bytes(range(256)) * 20_000)
    folder = RemoteFolder(bucket)
    ranges = [(5, 3), (4_000_000, 2), (10, 2)]
    wanted = bytes([5, 6, 7, 4_000_000 % 256, (4_000_000 + 1) % 256, 10, 11])
    assert folder.read("big", ranges).tobytes() == wanted
    with pytest.raises(CheckpointError, match=r"big: ends at byte 5120000; bytes up to 5120001 were expected"):
        folder.read("big", [(5_119_999, 2)])
    with pytest.raises(CheckpointError, match=r"no file 'bigg'\. Did you mean 'big'\?"):
        folder.size("bigg")


def test_small_files_of_a_bucket_are_copied_and_weights_are_not(bucket, tmp_path):
    copy_small_files(bucket, str(tmp_path))
    assert "config.json" in os.listdir(tmp_path) and "model.safetensors" not in os.listdir(tmp_path)


def pipe(folder, address):
    """Copies a folder's files into fsspec's memory filesystem."""
    for file in Path(folder).iterdir():
        fsspec.filesystem("memory").pipe_file(f"{address.removeprefix('memory:/')}/{file.name}", file.read_bytes())


@pytest.fixture
def whole(bucket):
    """The model's address, its tokenizer beside it."""
    files = fsspec.filesystem("memory")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        files.pipe_file(f"/bucket/model/{name}", (ASSETS / "smoke" / name).read_bytes())
    files.pipe_file("/bucket/model/generation_config.json", json.dumps({"eos_token_id": [2, 5]}).encode())
    return bucket


def test_a_tokenizer_in_a_bucket_is_the_one_on_disk(whole, tmp_path):
    there, here = load_tokenizer(whole), load_tokenizer(ASSETS / "smoke")
    assert there.encode("naïve 漢字, hello") == here.encode("naïve 漢字, hello")
    assert there.chat_template == here.chat_template and there.stop_ids == here.stop_ids | {2, 5}
    there.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("hello") == here.encode("hello")


def test_a_bucket_without_a_tokenizer_is_refused_by_its_address(bucket):
    message = f"no tokenizer in '{bucket}': it needs tokenizer.json .* contains config.json"
    with pytest.raises(ModelError, match=message):
        load_tokenizer(bucket)
    with pytest.raises(CheckpointError, match="cannot list memory://nowhere"):
        load_tokenizer("memory://nowhere")


def test_an_adapter_and_its_base_may_both_lie_in_buckets(whole, tmp_path):
    loaded = load_model(whole)
    attach_adapter(loaded.module, AdapterConfig(r=2), 0)
    for adapter in adapters(loaded.module).values():
        adapter.lora_b.set_value(adapter.lora_b.get_value() + 0.05)
    write_adapter(loaded.module, str(tmp_path / "lora"), base=whole)
    assert [check.reader for check in check_export(loaded, str(tmp_path / "lora"), dtype="float32")] == ["jaxft"]
    pipe(tmp_path / "lora", "memory://bucket/lora")
    for place in (str(tmp_path / "lora"), "memory://bucket/lora"):
        np.testing.assert_array_equal(load_model(place).logits(TOKENS), loaded.logits(TOKENS))
        assert load_tokenizer(place).encode("hello") == load_tokenizer(ASSETS / "smoke").encode("hello")


def test_the_command_answers_from_a_bucket(whole, capsys):
    assert cli.main(["generate", f"--model={whole}", "--prompt=ABC", "--max_new_tokens=3", "--json"]) in (0, None)
    assert len(json.loads(capsys.readouterr().out)["answers"]) == 1


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("nonsense://x/y", r"cannot read nonsense://x/y"),
        ("simplecache::memory://bucket/model", r"chained addresses are not read"),
        ("memory://nowhere", r"memory://nowhere"),
        ("zip://x", r"zip://x is no address of a folder: unpack"),
        ("reference://x", r"reference://x is no address of a folder"),
    ],
)
def test_addresses_that_cannot_be_read_are_refused(path, match):
    with pytest.raises(CheckpointError, match=match):
        open_weights(path)


def test_buckets_need_their_library_and_say_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    fsspec.config.conf.pop("gs", None)
    with pytest.raises(CheckpointError, match=r"pip install gcsfs"):
        open_folder("gs://bucket/model")


def test_an_index_of_a_bucket_that_leads_elsewhere_is_refused(bucket):
    files = fsspec.filesystem("memory")
    files.rm("/bucket/model/model.safetensors")
    index = {"weight_map": {"w": "../other/model.safetensors"}}
    files.pipe_file("/bucket/model/model.safetensors.index.json", json.dumps(index).encode())
    with pytest.raises(CheckpointError, match=r"names '\.\./other/model\.safetensors', which is not a file name"):
        SafetensorsFolder(bucket)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_links_out_of_a_folder_are_refused(tmp_path, name):
    outside, folder = tmp_path / "outside", tmp_path / "model"
    outside.mkdir()
    folder.mkdir()
    (outside / "config.json").write_text("{}")
    save_file({"w": np.zeros(2, np.float32)}, outside / "model.safetensors")
    (folder / name).symlink_to(outside / name)
    with pytest.raises(CheckpointError, match=r"is a link to .*outside"):
        read_json(str(folder / name)) if name == "config.json" else SafetensorsFolder(folder)


def test_an_oversize_config_is_refused_unread(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**8 + 1)
    with pytest.raises(CheckpointError, match=r"has 100000001 bytes; at most 100000000 are read"):
        read_json(str(tmp_path / "config.json"))


def test_a_config_that_names_a_field_twice_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 1, "hidden_size": 2}')
    with pytest.raises(CheckpointError, match=r"not valid JSON: the name .* is there twice"):
        read_json(str(tmp_path / "config.json"))


# -- the hub ----------------------------------------------------------------------------------------

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
FETCH = """
import sys
from jaxft.files.hub import fetch_hub
from jaxft.errors import CheckpointError
try:
    print(fetch_hub(sys.argv[1]))
except CheckpointError as error:
    print("refused:", error)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """The three addresses of the hub that a snapshot needs. Files differ by commit."""

    protocol_version = "HTTP/1.1"
    FILES = {"config.json", "model.safetensors", "modeling_evil.py", "pytorch_model.bin"}
    QUANTS = {"tiny-Q4_0.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "README.md"}
    asked: list[str] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        Hub.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        of_repo = {"tiny": self.FILES, "quants": self.QUANTS}
        if parts[:3] == ["api", "models", "me"] and parts[3] in of_repo:
            name = parts[5] if len(parts) > 5 else "main"
            return self.api(COMMITS.get(name, name), of_repo[parts[3]], tree="tree" in parts, body=body)
        if parts[0] == "me" and parts[2] == "resolve" and parts[4] in of_repo.get(parts[1], ()):
            commit = COMMITS.get(parts[3], parts[3])
            content = json.dumps({"commit": commit, "file": parts[4]}).encode()
            tag = hashlib.sha1(content).hexdigest()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "Content-Type": "application/octet-stream"}
            return self.send(200, content, body, headers)
        self.send(404, b"{}", body, {"X-Error-Code": "EntryNotFound"})

    def api(self, commit, names, *, tree, body):
        files = [{"rfilename": f, "path": f, "type": "file", "oid": "0" * 40, "size": 1} for f in sorted(names)]
        answer = files if tree else {"id": "me/tiny", "sha": commit, "siblings": files}
        self.send(200, json.dumps(answer).encode(), body, {"Content-Type": "application/json"})

    def send(self, code, content, body, headers):
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """fetch(path, offline=...) in a fresh process against a stand-in for the hub, with one cache."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path_factory.mktemp("hf_home")

    def fetch(path, *, offline=False):
        env = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", FETCH, path], cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    yield fetch
    server.shutdown()


def test_a_repository_is_fetched_pinned_and_found_again_offline(hub):
    main, pinned = hub("hf://me/tiny"), hub("hf://me/tiny@v1")
    assert os.path.basename(main) == COMMITS["main"] and os.path.basename(pinned) == COMMITS["v1"]
    assert sorted(os.listdir(main)) == ["config.json", "model.safetensors"], "no code, no pickles"
    assert read_json(os.path.join(pinned, "config.json"))["commit"] == COMMITS["v1"]
    asked = len(Hub.asked)
    assert hub("hf://me/tiny", offline=True) == main and hub("hf://me/tiny@v1", offline=True) == pinned
    assert len(Hub.asked) == asked, "nothing is asked for offline"
    assert hub("hf://me/other", offline=True).startswith("refused: cannot get hf://me/other (revision main)")


def test_a_gguf_file_is_fetched_by_its_name_with_all_of_its_parts(hub):
    one = hub("hf://me/quants/tiny-Q4_0.gguf@v1")
    assert one.endswith(f"{COMMITS['v1']}/tiny-Q4_0.gguf") and os.listdir(os.path.dirname(one)) == ["tiny-Q4_0.gguf"]
    part = hub("hf://me/quants/big-00002-of-00002.gguf")
    assert os.path.basename(part) == "big-00002-of-00002.gguf"
    assert sorted(os.listdir(os.path.dirname(part))) == ["big-00001-of-00002.gguf", "big-00002-of-00002.gguf"]
    assert hub("hf://me/quants/big-00002-of-00002.gguf", offline=True) == part
    assert hub("hf://me/quants/absent.gguf").startswith("refused: cannot get hf://me/quants/absent.gguf")


def test_a_repository_of_gguf_files_alone_is_refused_with_their_names(hub):
    said = hub("hf://me/quants")
    assert said.startswith(
        "refused: hf://me/quants has no config.json, and these GGUF files: big-00001-of-00002.gguf, "
    )
    assert said.endswith("Name one of them, such as hf://me/quants/big-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("hf://me/tiny", HubPath(repo="me/tiny")),
        ("hf://me/tiny@v1", HubPath(repo="me/tiny", revision="v1")),
        ("hf://me/tiny/sub/a.gguf@v1", HubPath(repo="me/tiny", file="sub/a.gguf", revision="v1")),
        ("hf://gpt2", HubPath(repo="gpt2")),
    ],
)
def test_paths_of_the_hub(path, expected):
    assert hub_path(path) == expected


def test_other_files_of_the_hub_are_refused():
    with pytest.raises(CheckpointError, match="only a GGUF file may be named, such as hf://owner/name/model.gguf"):
        hub_path("hf://me/tiny/model.safetensors")


def test_a_revision_that_contradicts_the_path_is_refused():
    with pytest.raises(CheckpointError, match=r"names the revision 'v1', but revision='main': give only one"):
        fetch_hub("hf://me/tiny@v1", "main")


def test_sizes_and_times_tell_the_files_of_a_model(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"1")
    (first, one), (second, other) = ((name, rest) for name, *rest in sizes_and_times(str(tmp_path)))
    assert (first, second) == ("b", "sub/a") and (one[0], other[0]) == (1, 3)
    assert other[1] == (tmp_path / "sub" / "a").stat().st_mtime_ns
    assert [entry[1] for entry in sizes_and_times(str(tmp_path / "b"))] == [1]
    assert sizes_and_times(str(tmp_path / "absent")) == []
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/sizes/c", b"12")
    assert sizes_and_times("memory://sizes") == [("c", 2, 0)]


@pytest.mark.parametrize("path", ["HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2org/gpt2", "a/B_c.d-7", "a/b@v1.0"])
def test_names_of_the_hub_are_recognised(path):
    assert hub_hint(path) == f" For the model of this name on the Hugging Face hub, write hf://{path}."
    with pytest.raises(ModelError, match=f"write hf://{path}"):
        load_tokenizer(path)
    with pytest.raises(CheckpointError, match=f"write hf://{path}"):
        load_model(path)


@pytest.mark.parametrize(
    "path", ["model", "./owner/name", "/owner/name", "hf://owner/name", "a/b/c", "runs/", "{here}"]
)
def test_other_paths_are_no_names_of_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "folder").mkdir(parents=True)
    assert hub_hint(path.format(here="own/folder")) == ""
