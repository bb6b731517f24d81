"""Files, uploads, models, keys, names and bounds over the protocol: the server alone, without a job."""

import asyncio
import hashlib
import io
import json
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
from servers import MODEL, Running, rows, upload, wait_for

from jaxft import cli
from jaxft.serving.app import ENDPOINTS, OPEN_PATHS
from jaxft.serving.endpoints import page
from jaxft.serving.storage.keys import SCOPES
from jaxft.serving.storage.state import new_id

BOUNDARY = "jaxft"


def ask(
    server: Running, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, Any, Any]:
    """(status, JSON of an error or bytes, headers) of a request that no SDK would send; headers: host=..."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    given.setdefault("authorization", f"Bearer {server.key}")
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", body, given, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read(), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"], error.headers


def form(*parts: tuple[str, str | None, bytes], end: str = "--") -> bytes:
    """A form of (name, filename, content) parts."""
    out = b""
    for name, filename, content in parts:
        label = "" if filename is None else f'; filename="{filename}"'
        out += (
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{label}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return out + f"--{BOUNDARY}{end}\r\n".encode()


def send_form(server: Running, body: bytes, path: str = "/v1/files", **headers: str) -> tuple[int, Any, Any]:
    return ask(server, path, "POST", body, content_type=f"multipart/form-data; boundary={BOUNDARY}", **headers)


PURPOSE = ("purpose", None, b"fine-tune")


def test_files_from_a_path_bytes_and_a_stream(client, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(rows())
    sent = [path, ("named.jsonl", rows()), io.BytesIO(rows()), open(path, "rb")]
    files = [client.files.create(file=one, purpose="fine-tune") for one in sent]
    assert {(file.bytes, file.status, file.purpose) for file in files} == {(len(rows()), "processed", "fine-tune")}
    assert [files[0].filename, files[1].filename] == ["rows.jsonl", "named.jsonl"]
    assert client.files.wait_for_processing(files[0].id).id == files[0].id
    assert client.files.content(files[2].id).read() == rows()
    listed = [file.id for file in client.files.list(limit=2, purpose="fine-tune")]
    assert listed[:4] == [file.id for file in files[::-1]]
    assert [file.id for file in client.files.list(limit=3, order="asc")] == listed[::-1]
    for file in files:
        assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError) as refused:
        client.files.retrieve(files[0].id)
    assert refused.value.code == "file_not_found"


def test_the_async_client(server):
    async def use() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=server.key, max_retries=0) as client:
            file = await client.files.create(file=("a.jsonl", rows()), purpose="fine-tune")
            job = await client.fine_tuning.jobs.create(
                model=MODEL, training_file=file.id, extra_body={"jaxft": {"start": False}}
            )
            await client.fine_tuning.jobs.cancel(job.id)
            assert (await client.files.content(file.id)).read() == rows()
            return [event.message async for event in client.fine_tuning.jobs.list_events(job.id, limit=1)]

    assert "Job cancelled" in asyncio.run(use())


def test_a_download_is_never_shown_by_a_browser(client, server):
    id = upload(client, b"<script>alert(1)</script>", "../../etc/<b>passwd")
    assert client.files.retrieve(id).filename == "../../etc/<b>passwd"
    status, content, headers = ask(server, f"/v1/files/{id}/content")
    assert (status, content, headers["x-content-type-options"]) == (200, b"<script>alert(1)</script>", "nosniff")
    assert headers["content-type"] == "application/octet-stream" and headers["content-disposition"] == "attachment"
    folders = {path.name for path in server.state.iterdir() if path.is_dir()}
    assert folders <= {"engines", "files", "jobs", "models", "uploads"}


def test_a_file_expires(client, server, monkeypatch):
    life = {"anchor": "created_at", "seconds": 3600}
    file = client.files.create(file=("a.jsonl", rows()), purpose="fine-tune", expires_after=life)
    assert file.expires_at == file.created_at + 3600
    for seconds in (3599, 2592001):
        with pytest.raises(openai.BadRequestError, match=r"expires_after\.seconds"):
            client.files.create(file=b"", purpose="fine-tune", expires_after=life | {"seconds": seconds})
    monkeypatch.setattr("jaxft.serving.storage.files.now", lambda: file.expires_at)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (form(PURPOSE), "has no file in the field 'file'"),
        (form(PURPOSE, ("file", "a", rows()), end=""), "cut off"),
        (form(("file", "a", rows())), "purpose is missing"),
        (form(("purpose", None, b"assistants"), ("file", "a", rows())), "purpose is 'assistants'"),
        (form(PURPOSE, ("file", "a.jsonl.gz", rows())), "Packed files"),
        (form(PURPOSE, ("file", "a", rows()), ("file", "b", rows())), "one file"),
        (form(PURPOSE, PURPOSE, ("file", "a", rows())), "twice"),
        (form(PURPOSE, ("color", None, b"red"), ("file", "a", rows())), "Unknown field 'color'"),
        (form(PURPOSE, ("other", "a", rows())), "one file, in the field 'file'"),
        (form(("purpose", None, bytes(70_000)), ("file", "a", rows())), "longer than 65,536"),
        (form(PURPOSE, ("file", "a" * 1001, rows())), "1 to 1000 characters"),
        (form(PURPOSE, ("file", "a\x00b", rows())), "control characters"),
        (b"nothing of a form", "damaged"),
        (b"", "cut off"),
    ],
)  # fmt: skip
def test_forms_that_are_refused_leave_nothing(server, body, message):
    before = sorted((server.state / "files").iterdir())
    status, error, _ = send_form(server, body)
    assert status == 400 and message in error["message"] and error["type"] == "invalid_request_error"
    assert sorted((server.state / "files").iterdir()) == before


def test_a_sender_that_goes_or_dawdles_disturbs_nobody(client, server):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        head = f"POST /v1/files HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {server.key}\r\n"
        head += f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\nContent-Length: 100000\r\n\r\n"
        sock.sendall(head.encode() + form(PURPOSE, ("file", "a", bytes(1000)))[:800])
        wait_for(lambda: list((server.state / "files").glob("*.partial")), "the beginning of the file")
        assert client.models.list().data  # another request is answered meanwhile
    wait_for(lambda: not list((server.state / "files").glob("*.partial")), "the removal of what was cut off")


def test_a_full_disk_is_told_and_nothing_is_left(client, server, monkeypatch):
    before = sorted((server.state / "files").iterdir())
    monkeypatch.setattr("jaxft.serving.storage.state.SPARE_BYTES", 2**62)
    with pytest.raises(openai.BadRequestError) as refused:
        upload(client, rows())
    assert refused.value.code == "insufficient_storage"
    with pytest.raises(openai.BadRequestError, match="disk of the server is full"):
        client.uploads.create(bytes=5, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    assert sorted((server.state / "files").iterdir()) == before


@pytest.mark.parametrize(("number", "refusal"), [(28, openai.BadRequestError), (5, openai.InternalServerError)])
def test_a_disk_that_fails_while_a_file_is_written(server, monkeypatch, number, refusal):
    before = sorted((server.state / "files").iterdir())

    def fail(reader: object) -> None:
        raise OSError(number, "of the disk", str(server.state))

    monkeypatch.setattr("jaxft.serving.http.multipart._FormReader.finish", fail)
    with pytest.raises(refusal) as refused:
        upload(server.client(), rows())  # a client of its own: its connection is closed after a failure
    assert str(server.state) not in str(refused.value)
    assert sorted((server.state / "files").iterdir()) == before


def test_a_file_in_parts(client, server, tmp_path):
    content = rows() * 1000
    path = tmp_path / "large.jsonl"
    path.write_bytes(content)
    done = client.uploads.upload_file_chunked(file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=20_000)
    assert done.status == "completed" and client.files.content(done.file.id).read() == content
    begun = client.uploads.create(bytes=6, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    parts = [client.uploads.parts.create(begun.id, data=text).id for text in (b"def", b"abc")]
    complete = client.uploads.complete
    md5 = hashlib.md5(b"abcdef").hexdigest()
    for wrong, message in (
        ({"part_ids": parts[:1]}, "The parts have 3 bytes, and the upload has 6"),
        ({"part_ids": [parts[0], parts[0]]}, "A part is there twice"),
        ({"part_ids": [*parts, "part_none"]}, "has no part"),
        ({"part_ids": parts, "md5": md5}, "have the md5"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            complete(begun.id, **wrong)
    with pytest.raises(openai.BadRequestError, match="longer than the 6 bytes"):
        client.uploads.parts.create(begun.id, data=b"g")
    done = complete(begun.id, part_ids=parts[::-1], md5=md5)
    assert client.files.content(done.file.id).read() == b"abcdef"
    with pytest.raises(openai.BadRequestError, match="The upload is completed"):
        complete(begun.id, part_ids=parts)
    again = complete(begun.id, part_ids=parts, extra_headers={"x-stainless-retry-count": "1"})
    assert again.file.id == done.file.id and not list((server.state / "uploads").glob(f"{begun.id}*"))


def test_uploads_end_by_cancellation_and_after_an_hour(client, server, monkeypatch):
    first, second = (
        client.uploads.create(bytes=3, filename="a", mime_type="text/jsonl", purpose="fine-tune") for _ in range(2)
    )
    client.uploads.parts.create(first.id, data=b"abc")
    assert client.uploads.cancel(first.id).status == "cancelled"
    monkeypatch.setattr("jaxft.serving.storage.uploads.now", lambda: second.expires_at)
    for id, state in ((first.id, "cancelled"), (second.id, "expired")):
        with pytest.raises(openai.BadRequestError, match=f"The upload is {state}"):
            client.uploads.parts.create(id, data=b"abc")
    with pytest.raises(openai.NotFoundError):
        client.uploads.cancel("upload_none")
    assert not list((server.state / "uploads").iterdir())


def test_models(client, server):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "operator"
    with pytest.raises(openai.BadRequestError, match="is a base model"):
        client.models.delete(MODEL)
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'") as refused:
        client.models.retrieve("tinny")
    assert refused.value.code == "model_not_found"
    for path in ("../../state.sqlite3", "ft:tiny:jaxft::x/../y", "%2e%2e%2fx", "a%00b", "x" * 5000, "<b>"):
        status, error, _ = ask(server, f"/v1/models/{path}")
        assert status == 404 and str(server.state) not in error["message"] and len(error["message"]) < 400


def test_what_is_not_served_is_404_in_the_shape_of_the_protocol(client, server):
    with pytest.raises(openai.NotFoundError) as refused:
        client.embeddings.create(model=MODEL, input="a")
    assert refused.value.code == "unknown_url" and refused.value.request_id.startswith("req_")
    for path in ("/v1/files/", "/v1", "/docs", "/v1/files/..%2f..%2fetc"):
        assert ask(server, path)[0] == 404
    status, error, headers = ask(server, "/v1/files", "PUT")
    assert status == 405 and error["code"] == "method_not_allowed" and "POST" in headers["allow"]


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "no valid JSON"),
        (b"[" * 100_000, 400, "nested deeper"),
        (b'{"a": NaN}', 400, "NaN"),
        (b'{"model": "a", "model": "b"}', 400, "there twice"),
        (b"\xff\xfe{\x00}\x00", 400, "not UTF-8"),
        (b"[]", 400, "must be a JSON object"),
        (b'{"model": "tiny"}', 400, "training_file is missing"),
    ],
)
def test_bodies_that_are_refused(server, body, status, message):
    answer = ask(server, "/v1/fine_tuning/jobs", "POST", body, content_type="application/json")
    assert answer[0] == status and message in answer[1]["message"]


def test_a_body_that_is_too_long_is_refused_before_it_is_read(server):
    head = f"POST /v1/{{}} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {server.key}\r\n"
    kinds = {"fine_tuning/jobs": "application/json", "files": f"multipart/form-data; boundary={BOUNDARY}"}
    for path, kind in kinds.items():
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(f"{head.format(path)}Content-Type: {kind}\r\nContent-Length: {10**12}\r\n\r\n".encode())
            assert sock.recv(100).startswith(b"HTTP/1.1 413"), path


def test_bodies_of_another_kind_are_refused(server):
    path, kind = "/v1/fine_tuning/jobs", "application/x-www-form-urlencoded"
    assert ask(server, path, "POST", b"model=tiny", content_type=kind)[0] == 415
    assert ask(server, "/v1/files", "POST", b"{}", content_type="application/json")[0] == 415


def walked() -> list[tuple[str, str, tuple[str, ...]]]:
    """(method, path, scopes) of every endpoint, with ids that do not exist."""
    out = []
    for endpoint in ENDPOINTS:
        path = endpoint.path
        while "{" in path:
            path = path[: path.index("{")] + "none" + path[path.index("}") + 1 :]
        out.append((endpoint.method, f"/v1{path}", endpoint.scopes))
    return out


def test_every_path_wants_our_name_our_origin_and_a_key(server):
    own = f"127.0.0.1:{server.port}"
    for method, path, _ in [*walked(), ("GET", "/v1/none", ())]:
        body = b"" if method == "POST" else None
        assert ask(server, path, method, body, authorization="")[:2][0] == 401
        status, error, _ = ask(server, path, method, body, authorization="Bearer sk-jaxft-wrong")
        assert (status, error["code"]) == (401, "invalid_api_key")
        assert ask(server, path, method, body, host="evil.example")[0] == 403
        assert ask(server, path, method, body, host="evil.example", authorization="")[0] == 403
        assert ask(server, path, method, body, origin="https://evil.example")[0] == 403
    assert OPEN_PATHS == {"/health", *page.assets()} and "/" in OPEN_PATHS
    assert ask(server, "/health", authorization="")[1] == b'{"status":"warm"}'
    assert ask(server, "/health", host="evil.example")[0] == 403
    assert ask(server, "/v1/models", origin=f"http://{own}")[0] == 200


def test_every_path_wants_a_scope(server, capsys):
    keys = {scope: new_key(server, capsys, scope) for scope in SCOPES}
    for method, path, scopes in walked():
        if path == "/v1/jaxft/stream":
            continue
        for scope, key in keys.items():
            body = b"" if method == "POST" else None
            status = ask(server, path, method, body, authorization=f"Bearer {key}")[0]
            assert (status == 403) == bool(scopes and scope not in (*scopes, "admin")), (method, path, scope)


def test_a_key_without_the_scope_is_told_so(server, capsys):
    with pytest.raises(openai.PermissionDeniedError, match="needs the scope train"):
        server.client(new_key(server, capsys, "answer")).files.list()


def new_key(server: Running, capsys: pytest.CaptureFixture[str], scopes: str) -> str:
    capsys.readouterr()
    assert cli.main(["serve", "keys", "add", f"--state={server.state}", f"--scopes={scopes}", "--name=one"]) == 0
    return capsys.readouterr().out.strip()


def test_keys_are_added_shown_and_revoked_while_the_server_runs(server, capsys):
    def listed() -> list[dict]:
        assert cli.main(["serve", "keys", "list", f"--state={server.state}", "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    before = {row["id"] for row in listed()}
    key = new_key(server, capsys, "train")
    other = server.client(key)
    assert other.models.list().data
    known = listed()
    (row,) = (row for row in known if row["id"] not in before)
    assert row["scopes"] == "train" and row["last_used_at"]
    assert not [text for text in map(json.dumps, known) if key in text]
    assert cli.main(["serve", "keys", "revoke", f"--state={server.state}", f"--id={row['id']}"]) == 0
    with pytest.raises(openai.AuthenticationError):
        other.models.list()
    for wrong in (["keys", "ad"], ["kyes"], ["keys", "add", "--scopes=trian"], ["keys", "revoke", "--id=key-none"]):
        assert cli.main(["serve", *wrong, f"--state={server.state}"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    bytes_kept = b"".join(path.read_bytes() for path in server.state.glob("state.sqlite3*"))
    assert key.encode() not in bytes_kept and server.key.encode() not in bytes_kept


def test_the_system(client):
    system = client.get("/jaxft/system", cast_to=object)
    assert system["models"] == [MODEL] and system["status"] == "warm" and system["disk"]["free"] > 0
    assert 10**6 < system["server_bytes"] < 10**10


def test_the_log_has_no_content(server, caplog):
    secret = new_id("secret-")
    with caplog.at_level("INFO", logger="jaxft.serving.requests"):
        ask(server, f"/v1/models/{secret}")
        upload(server.client(), secret.encode(), f"{secret}.jsonl")
        wait_for(lambda: "POST /v1/files" in caplog.text, "the line of the request")
    assert "/v1/models/{model:path} 404" in caplog.text
    assert secret not in caplog.text and server.key not in caplog.text


def test_a_failure_of_the_program_is_500_without_its_cause(server, monkeypatch, caplog):
    def fail(*arguments: object) -> None:
        raise RuntimeError(f"secret {server.state}")

    monkeypatch.setattr("jaxft.serving.storage.models.tuned_models", fail)
    with pytest.raises(openai.InternalServerError) as refused:
        server.client().models.list()
    assert refused.value.request_id in str(refused.value) and "secret" not in str(refused.value)


def test_two_at_once_and_many_streams_are_bounded(server):
    opened = []
    try:
        for _ in range(65):
            request = urllib.request.Request(
                f"{server.url}/jaxft/stream", headers={"authorization": f"Bearer {server.key}"}
            )
            opened.append(urllib.request.urlopen(request, timeout=60))
            opened[-1].readline()
        pytest.fail("no bound")
    except urllib.error.HTTPError as error:
        assert error.code == 429 and error.headers["retry-after"] == "10" and len(opened) == 64
    finally:
        for one in opened:
            one.close()
    wait_for(lambda: _has_room(server), "room for a stream once the others are gone")


def _has_room(server: Running) -> bool:
    request = urllib.request.Request(f"{server.url}/jaxft/stream", headers={"authorization": f"Bearer {server.key}"})
    try:
        with urllib.request.urlopen(request, timeout=60):
            return True
    except urllib.error.HTTPError:
        time.sleep(0.1)
        return False


def test_the_state_is_for_its_owner_alone(server):
    assert Path(server.state).stat().st_mode & 0o077 == 0
