"""Pushing to the Hugging Face Hub, against a local end that keeps what is uploaded."""

import base64
import http.server
import json
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from jaxft.checkpoint.hub.base import BaseFacts
from jaxft.checkpoint.hub.push import Push
from jaxft.errors import ConfigError, ExportError

TOKEN = "hf_" + "x" * 34


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of a push. state: repositories by name, with `visibility` and `files`."""

    state: dict
    denied: int | None = None

    def log_message(self, *_):
        pass

    def answer(self, code, value=None, headers=()):
        body = json.dumps(value or {}).encode()
        self.send_response(code)
        for name, text in (("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def refused(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.denied and self.command == "POST":
            self.answer(self.denied, {"error": "denied"})
        else:
            return False
        return True

    def do_GET(self):
        if self.refused():
            return
        if self.path == "/api/whoami-v2":
            self.answer(200, {"name": "owner", "type": "user"})
            return
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        if name in self.state:
            self.answer(200, {"id": name, "sha": "0" * 40, "siblings": [], "tags": [], "modelId": name})
        else:
            self.answer(404, {"error": "Repository not found"}, [("X-Error-Code", "RepoNotFound")])

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refused():
            return
        if self.path == "/api/repos/create":
            wanted = json.loads(raw)
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in self.state:
                self.answer(409, {"error": "exists", "url": f"http://{self.headers['Host']}/{name}"})
                return
            visibility = wanted.get("visibility") or ("private" if wanted.get("private") else "public")
            self.state[name] = {"visibility": visibility, "files": {}}
            self.answer(200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(raw)["files"]
            ]
            self.answer(200, {"files": files})
        else:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            repo, home = self.state[name], f"http://{self.headers['Host']}/{name}"
            for line in raw.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    repo["files"][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(200, {"commitUrl": f"{home}/commit/1", "commitOid": "1" * 40, "success": True})


@pytest.fixture
def hub(monkeypatch):
    """The state of a running end, at which the library is pointed."""
    handler = type("Handler", (Hub,), {"state": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder(tmp_path) -> Path:
    """An exported adapter whose config names a folder of this machine."""
    out = tmp_path / "export"
    out.mkdir()
    config = {"base_model_name_or_path": str(tmp_path / "base"), "r": 8}
    (out / "adapter_config.json").write_text(json.dumps(config))
    (out / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    (out / "README.md").write_text("---\ntags: [jaxft]\n---\nhello\n")
    (out / ".cache").mkdir()
    (out / ".cache" / "lock").write_text("not for others")
    return out


def test_a_new_repository_is_private_and_holds_the_files(hub, folder):
    push = Push(name="owner/mine")
    push.check()
    address = push.push(folder, "owner/base")
    repo = hub.state["owner/mine"]
    assert repo["visibility"] == "private" and address.endswith("/owner/mine")
    assert repo["files"].keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert repo["files"]["adapter_model.safetensors"] == bytes(range(256))
    assert json.loads(repo["files"]["adapter_config.json"]) == {"base_model_name_or_path": "owner/base", "r": 8}
    assert not [name for name, content in repo["files"].items() if str(folder.parent).encode() in content]
    # The folder itself stays as the check of the export read it.
    assert str(folder.parent) in (folder / "adapter_config.json").read_text()


def test_a_repository_is_public_only_by_a_word(hub, folder):
    Push(name="owner/open", public=True).push(folder)
    assert hub.state["owner/open"]["visibility"] == "public"


def test_an_existing_repository_is_changed_only_by_a_word(hub, folder):
    Push(name="owner/mine").push(folder)
    (folder / "README.md").write_text("---\ntags: [jaxft]\n---\nsecond\n")
    with pytest.raises(ConfigError, match="the Hub has a repository of this name.*--update"):
        Push(name="owner/mine").check()
    with pytest.raises(ExportError, match="the repository exists"):
        Push(name="owner/mine").push(folder)
    update = Push(name="owner/mine", update=True)
    update.check()
    update.push(folder)
    assert hub.state["owner/mine"]["files"]["README.md"].endswith(b"second\n")


def test_a_wrong_token_and_a_lacking_permission_are_told_with_their_mend(hub, folder, monkeypatch):
    monkeypatch.setattr(hub, "denied", 403)
    with pytest.raises(ExportError, match="may not write to owner/mine: use a token with write.*is whole in"):
        Push(name="owner/mine").push(folder)
    monkeypatch.setattr(hub, "denied", 500)
    with pytest.raises(ExportError, match="the Hub answered 500"):
        Push(name="owner/mine").push(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ExportError, match="no token, or one that the Hub does not know: set HF_TOKEN"):
        Push(name="owner/mine").check()


def test_a_missing_token_is_told(hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    with pytest.raises(ExportError, match="there is no token: set HF_TOKEN"):
        Push(name="owner/mine").check()


def test_an_end_that_cannot_be_reached_is_told(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ExportError, match="cannot reach the Hub: .*Check the network"):
        Push(name="owner/mine").check()


@pytest.mark.parametrize("name", ["mine", "a/b/c", "owner/..", "owner/na me", "hf://owner/name"])
def test_names_are_checked_before_anything_is_asked(name):
    with pytest.raises(ConfigError, match="--push="):
        Push(name=name).check()
    with pytest.raises(ConfigError, match="--hub_base="):
        Push(name="owner/mine", base=name).check()


def test_an_adapter_is_pushed_with_a_base_that_others_have():
    push = Push(name="owner/mine")
    with pytest.raises(ConfigError, match="names? its base by a folder of this machine, /x/base.*--hub_base"):
        push.with_base(BaseFacts(), "/x/base", adapter=True)
    assert push.with_base(BaseFacts(name="owner/base"), "/x", adapter=True).name == "owner/base"
    assert push.with_base(BaseFacts(license="mit"), "/x", adapter=False) == BaseFacts(license="mit")
    given = Push(name="owner/mine", base="owner/other").with_base(BaseFacts(name="owner/base"), "/x", adapter=True)
    assert given.name == "owner/other"
