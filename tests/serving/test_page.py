"""The page without a browser: what is served, to whom, under which policy, and what its files may not hold."""

import json
import re
import urllib.error
import urllib.request

import pytest
from page_samples import RESOLVED, add_job, fill, tell
from servers import Running, create, in_thread, rows, settings_of, until

from jaxft.assets import ASSETS
from jaxft.errors import ConfigError
from jaxft.files.run_folder import write_json
from jaxft.serving.endpoints import page
from jaxft.serving.jobs.objects import show_job
from jaxft.serving.storage.jobs import job_of
from jaxft.serving.storage.state import open_state
from jaxft.serving.supervision.reading import read_worker
from jaxft.serving.supervision.watch import Watch

MOST_BYTES = 100_000
SOURCES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ASSETS / "serve").iterdir())}
SCRIPTS = {name: text for name, text in SOURCES.items() if name.endswith(".js")}
UNSAFE = (
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|\bFunction\(|setTimeout\(\"|srcdoc|javascript:"
)


def get(server: Running, path: str, **headers: str):
    request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def test_every_file_is_served_without_a_key_and_nothing_else_is(server):
    assert len(SOURCES) == len(page.assets()) > 10
    for name, text in SOURCES.items():
        path = "/" if name == "index.html" else f"/page/{name}"
        status, content, headers = get(server, path)
        assert (status, content.decode()) == (200, text)
        assert headers["x-content-type-options"] == "nosniff" and headers["content-security-policy"] == page.POLICY
        assert headers["content-type"].split(";")[0] == page.TYPES["." + name.rpartition(".")[2]]
        assert get(server, path, **{"If-None-Match": headers["etag"]})[:2] == (304, b"")
        assert get(server, path, Host="evil.example")[0] == 403
    for path in (
        "/page",
        "/page/",
        "/page/none.js",
        "/page/../serve/app.js",
        "/page/%2e%2e/smoke/config.json",
        "/index.html",
    ):
        assert get(server, path)[0] == 401
        assert get(server, path, Authorization=f"Bearer {server.key}")[0] == 404


def test_the_data_of_the_page_needs_a_key(server):
    asked = {path for text in SCRIPTS.values() for path in re.findall(r'call\("GET", "(/[\w/]+)', text)}
    assert {"/models", "/jaxft/system", "/fine_tuning/jobs"} <= asked
    for path in (*asked, "/jaxft/stream"):
        assert get(server, f"/v1{path}")[0] == 401


def test_the_policy_lets_nothing_run_but_the_files_of_the_page():
    policy = dict(part.strip().partition(" ")[::2] for part in page.POLICY.split(";"))
    assert policy.pop("default-src") == policy.pop("frame-ancestors") == policy.pop("base-uri") == "'none'"
    assert policy.pop("form-action") == policy.pop("trusted-types") == "'none'"
    assert policy.pop("require-trusted-types-for") == "'script'"
    assert policy == {name: "'self'" for name in ("script-src", "style-src", "connect-src", "img-src")}


def test_the_page_is_small_and_holds_neither_inline_code_nor_other_addresses():
    assert sum(len(text.encode()) for text in SOURCES.values()) < MOST_BYTES
    start = SOURCES["index.html"]
    assert all(not body.strip() for body in re.findall(r"<script[^>]*>(.*?)</script>", start, re.DOTALL))
    assert "<style" not in start and not re.search(r"\s(?:on\w+|style)=", start)
    for name, text in SOURCES.items():
        others = set(re.findall(r"(?:https?|wss?)://[\w./-]+|@import|\burl\(", text)) - {"http://www.w3.org/2000/svg"}
        assert not others, name
        assert not re.findall(UNSAFE, text), name


def test_the_files_name_each_other_and_all_are_used():
    used = {"index.html", *re.findall(r'(?:href|src)="/page/([\w.]+)"', SOURCES["index.html"])}
    for name, text in SCRIPTS.items():
        imported = re.findall(r'^import (.+) from "\./([\w.]+)";$', text, re.MULTILINE)
        used |= {file for _, file in imported}
        for names, file in imported:
            for one in re.findall(r"\w+", names) if names.startswith("{") else []:
                assert re.search(
                    rf"^export (?:async )?(?:function\*?|const|class) {one}\b", SOURCES[file], re.MULTILINE
                ), f"{name}: {file} has no {one}"
                assert len(re.findall(rf"\b{one}\b", text)) > 1, f"{name} does not use {one}"
    assert used == SOURCES.keys()


def test_the_first_key_is_told_with_the_address_of_the_page(server):
    serving, first, with_key = server.told
    assert serving.endswith(f"the page at http://127.0.0.1:{server.port}/")
    assert first.endswith(f" {server.key}")
    assert with_key.endswith(f" http://127.0.0.1:{server.port}/#key={server.key}")


def test_messages_are_listed_without_metrics(server, client):
    job = until(client, create(client, rows(steps=3)).id, "succeeded")
    path = f"/v1/fine_tuning/jobs/{job.id}/events?limit=100"
    key, listed = {"Authorization": f"Bearer {server.key}"}, {}
    for kind in ("", "&type=message", "&type=metrics"):
        listed[kind] = [one["message"] for one in json.loads(get(server, f"{path}{kind}", **key)[1])["data"]]
    assert [text[:4] for text in listed["&type=metrics"]] == ["Step"] * 3
    assert listed["&type=message"] == [text for text in listed[""] if not text.startswith("Step")] != listed[""]
    assert get(server, f"{path}&type=all", **key)[0] == 400


def test_time_is_known_from_an_earlier_job_of_the_same_base(tmp_path):
    ids = fill(tmp_path / "state")
    with in_thread(tmp_path / "state", str(ASSETS / "smoke"), price_per_hour=3.0) as server:
        client = server.client()
        seen = {name: client.fine_tuning.jobs.retrieve(id).jaxft for name, id in ids.items()}
        assert client.get("/jaxft/system", cast_to=object)["price_per_hour"] == 3.0
    # 3,932,160 tokens at 8,192 a second.
    assert seen["waits"]["estimate"] == {"seconds": 480, "job_id": ids["done"]}
    assert seen["waits"]["warnings"] == RESOLVED["warnings"] and seen["done"]["estimate"] is None
    assert [seen[name]["number"] for name in ("done", "failed", "cancelled", "waits")] == [1, 2, 3, 4]


def test_nothing_is_estimated_without_an_earlier_job(tmp_path):
    with open_state(tmp_path / "state") as state:
        folder = add_job(state, {}, jaxft={"start": False})
        write_json(folder.resolved, RESOLVED)
        tell(folder, "validated", "Files validated")
        read_worker(state, folder.path.name, Watch(folder))
        assert show_job(state, job_of(state, folder.path.name))["jaxft"]["estimate"] is None


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan"), float("inf")])
def test_a_price_that_is_none_is_refused(tmp_path, price):
    with pytest.raises(ConfigError, match="--price_per_hour=.* must be above 0"):
        settings_of(tmp_path, "none", price_per_hour=price).check()
