"""The page in the Chromium of this machine: what its views do, that strangers' text is inert, and accessibility.

With JAXFT_SCREENSHOTS=1 in the environment the pictures in docs/images/serve are taken anew.
"""

import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import chat_stub
import pytest
from page_samples import MARKUP, RESOLVED, STEPS, fill, metrics
from servers import MODEL, Running, ServerProcess, create, in_thread, rows, until, write_model

from jaxft.assets import ASSETS
from jaxft.serving import app
from jaxft.serving.storage.keys import add_key
from jaxft.serving.storage.state import open_state

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in (os.environ.get("CHROMIUM"), *map(shutil.which, NAMES)) if path), None)
LACKING = [name for name in ("playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None]
IMAGES = Path(__file__).parents[2] / "docs" / "images" / "serve"
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
SIZE = {"width": 1000, "height": 720}
SLOW_MS = 120_000  # that a machine with other work may take
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the path (CHROMIUM names another)"),
    pytest.mark.skipif(bool(LACKING), reason=f"{', '.join(LACKING)} is not installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=CHROMIUM)
        yield one
        one.close()


@pytest.fixture(scope="module")
def ids() -> dict[str, str]:
    """The ids of the jobs in the state of the server."""
    return {}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, ids: dict[str, str]) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("page") / "state"
    ids |= fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "ENDPOINTS", (chat_stub.STUB, *app.ENDPOINTS))
        with in_thread(folder, str(ASSETS / "smoke"), price_per_hour=3.0) as running:
            yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Any:
    return server.client()


@pytest.fixture
def visit(browser: Any, server: Running) -> Iterator[Callable[..., Any]]:
    """Opens a view with the key of the server; nothing may fail in the page, or be refused by its policy."""
    context = browser.new_context(viewport=SIZE)
    context.set_default_timeout(SLOW_MS)
    wrong: list[str] = []
    context.on("weberror", lambda error: wrong.append(str(error.error)))
    context.on("console", lambda one: wrong.append(one.text) if "Content Security Policy" in one.text else None)
    context.on("dialog", lambda dialog: wrong.append(dialog.message))

    def open_view(where: str = "#/jobs", key: str | None = None, port: int | None = None) -> Any:
        page = context.new_page()
        base = f"http://127.0.0.1:{port or server.port}/"
        page.goto(f"{base}#key={key or server.key}")
        page.goto(base + where)
        return page

    yield open_view
    context.close()
    assert not wrong


def heading(page: Any, name: str) -> None:
    """Waits for the heading of a view."""
    page.get_by_role("heading", level=1, name=name, exact=True).wait_for()


def test_the_key_is_taken_from_the_address_and_a_wrong_one_is_asked_for(visit, server):
    page = visit()
    heading(page, "Jobs")
    assert server.key not in page.url and page.evaluate("sessionStorage.getItem('jaxft-key')") == server.key
    assert page.evaluate("document.cookie + JSON.stringify(localStorage)") == "{}"
    page.go_back()
    assert server.key not in page.url
    page.goto(f"http://127.0.0.1:{server.port}/#key=sk-jaxft-wrong")
    page.get_by_text("The server does not know this key.").wait_for()
    assert page.evaluate("sessionStorage.length") == 0
    page.get_by_label("Key", exact=True).fill(server.key)
    page.keyboard.press("Enter")
    page.get_by_role("link", name="support-answers").first.wait_for()
    page.get_by_role("button", name="Forget the key").click()
    heading(page, "Key")
    assert page.evaluate("sessionStorage.length") == 0


def test_every_state_is_a_word(visit):
    page = visit()
    page.get_by_role("link", name="support-answers").first.wait_for()
    cards = page.get_by_role("main").get_by_role("listitem")
    texts = [" ".join(text.split("\n")) for text in cards.all_inner_texts()]
    found = {
        name: text
        for text in texts
        for name in ("look-before", "given_up", "failed.rows", "support-answers")
        if name in text
    }
    assert "waits for its start" in found["look-before"] and "cancelled" in found["given_up"]
    assert "failed" in found["failed.rows"].split() and "line 3" in found["failed.rows"]
    assert "succeeded" in found["support-answers"] and f"step {STEPS} of {STEPS}" in found["support-answers"]


def test_a_new_job_is_examined_before_it_starts(visit, client):
    page = visit("#/new")
    page.get_by_label("Rows to train on").set_input_files(
        {"name": f"{MARKUP}.jsonl", "mimeType": "text/plain", "buffer": rows(bad="training_file, line 2: no answer")}
    )
    page.get_by_label("Suffix").fill("from.page")
    page.get_by_label("Epochs").fill("2")
    page.get_by_text("Further settings").click()
    page.get_by_label("Settings of the run").fill("adapter.rank=8")
    page.get_by_role("button", name="Upload and examine").click()
    page.get_by_role("alert").filter(has_text="'adapter.rank' is no setting of a job").wait_for()
    page.get_by_label("Settings of the run").fill('adapter.r=8\noptim.name="adamw"')
    page.get_by_role("button", name="Upload and examine").click()
    page.get_by_role("alert").filter(has_text="training_file, line 2: no answer").wait_for()
    good = rows(steps=6, wait=3, resolved={**RESOLVED, "plan": {**RESOLVED["plan"], "steps": 6}})
    make = "(text) => { const all = new DataTransfer(); all.items.add(new File([text], 'good.jsonl')); return all; }"
    dropped = page.evaluate_handle(make, good.decode())
    page.locator(".drop").first.dispatch_event("drop", {"dataTransfer": dropped})
    page.get_by_text("good.jsonl", exact=True).wait_for()
    page.get_by_role("button", name="Examine again").click()
    page.get_by_text("406,323 tokens, 31.0%").wait_for()
    main = page.get_by_role("main")
    assert main.locator("mark").first.inner_text() == "It is on its way, and comes on Tuesday.<|im_end|>"
    assert main.get_by_text("about 8 min, at the rate of an earlier job: 0.40 at 3.00 an hour").is_visible()
    assert main.get_by_text(RESOLVED["warnings"][0]).is_visible()
    draft = next(iter(client.fine_tuning.jobs.list(limit=1)))
    assert (draft.status, draft.jaxft["config"], draft.jaxft["suffix"]) == (
        "paused",
        {"adapter.r": 8, "optim.name": "adamw"},
        "from.page",
    )
    page.get_by_role("button", name="Start").click()
    heading(page, "from.page")
    # It trains, waits at a step, and is paused, resumed and cancelled by dialogs.
    page.get_by_text("step 3 of 6, loss").wait_for()
    verb(page, "Pause", "Back")
    assert client.fine_tuning.jobs.retrieve(draft.id).status == "running"
    verb(page, "Pause", "Pause")
    page.get_by_text("paused", exact=True).wait_for()
    assert page.locator("#live").inner_text() == "from.page: paused"
    verb(page, "Resume", "Resume")
    page.get_by_text("step 6 of 6, loss").wait_for()
    until(client, draft.id, "succeeded")


def verb(page: Any, name: str, answer: str) -> None:
    """Presses a button of a job, and answers the dialog by the keyboard."""
    page.get_by_role("main").get_by_role("button", name=name, exact=True).click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("button", name=answer, exact=True).press("Enter")
    dialog.wait_for(state="detached")


def test_the_curves_are_those_of_the_run(visit, ids):
    page = visit(f"#/job/{ids['done']}")
    loss = page.get_by_role("slider", name="Loss by step")
    loss.press("End")
    last = [row for row in metrics(STEPS) if row["step"] == STEPS]
    words = f"step {STEPS}: training {last[0]['loss']:.4g}, held-out {last[1]['eval_loss']:.4g}"
    assert loss.get_attribute("aria-valuetext") == words and page.locator(".readout").first.inner_text() == words
    loss.press("ArrowLeft")
    assert loss.get_attribute("aria-valuenow") == str(STEPS - 1)
    loss.press("Home")
    loss.press("PageDown")
    assert loss.get_attribute("aria-valuenow") == "1"
    loss.press("PageUp")
    assert loss.get_attribute("aria-valuenow") == "11"
    box = loss.bounding_box()
    page.mouse.move(box["x"] + 52 + (box["width"] - 64) / 2, box["y"] + 100)
    assert abs(int(loss.get_attribute("aria-valuenow")) - STEPS / 2) <= 2
    page.get_by_text("The curves as a table").click()
    table = page.get_by_role("region", name="Loss and accuracy by step")
    table.get_by_role("row").first.wait_for()
    assert table.get_by_role("row").count() == STEPS // 3 + 2
    assert table.get_by_role("row").last.inner_text().split("\t")[1:3] == words.replace(",", "").split()[3::2]


def test_curves_lose_no_peak(visit):
    """Against the same by Python: the range of a pixel, the average, and round numbers of axes."""
    page = visit()
    points = [[row["step"], row["loss"]] for row in metrics(500) if "loss" in row]
    call = "(async (a) => { const m = await import('/page/chart.js'); return m[a[0]](...a.slice(1)); })"
    found = page.evaluate("async (p) => (await import('/page/chart.js')).columns(p, (step) => step / 25)", points)
    by_pixel: dict[int, list[float]] = {}
    for step, value in points:
        by_pixel.setdefault(int(step / 25 + 0.5), []).append(value)
    assert found == [{"x": x, "first": v[0], "low": min(v), "high": max(v), "last": v[-1]} for x, v in by_pixel.items()]
    smooth = page.evaluate(call, ["smoothed", points, 0.9])
    weights = [0.9**k for k in range(500)]
    for n in (0, 1, 10, 499):
        past = [value for _, value in points[: n + 1]][::-1]
        mean = sum(w * v for w, v in zip(weights, past, strict=False)) / sum(weights[: n + 1])
        assert smooth[n][1] == pytest.approx(mean, rel=1e-9)
    assert page.evaluate(call, ["ticks", 0.37, 2.43, 4]) == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert page.evaluate(call, ["logTicks", 0.4, 30]) == pytest.approx([0.5, 1, 2, 5, 10, 20])
    assert page.evaluate(call, ["nearest", [1, 4, 9], 7]) == 9 and page.evaluate(call, ["nearest", [1, 4, 9], 6]) == 4


def test_the_copied_requests_make_the_same_job(visit, client, server, ids, monkeypatch):
    monkeypatch.setenv("JAXFT_KEY", server.key)
    page = visit(f"#/job/{ids['done']}")
    python = page.get_by_role("region", name="Python").inner_text()
    names: dict[str, Any] = {}
    exec(
        python.replace("fine_tuning.jobs.create(", 'fine_tuning.jobs.create(extra_headers={"x-made-by": "test"}, '),
        names,
    )
    made = [names["job"].id]
    if shutil.which("curl"):
        shell = page.get_by_role("region", name="curl").inner_text()
        done = subprocess.run(["bash", "-c", shell], capture_output=True, check=True, env=os.environ)
        made.append(json.loads(done.stdout)["id"])
    first = client.fine_tuning.jobs.retrieve(ids["done"])
    for id in made:
        job = client.fine_tuning.jobs.retrieve(id)
        client.fine_tuning.jobs.cancel(id)
        for name in ("model", "training_file", "seed", "metadata", "hyperparameters"):
            assert getattr(job, name) == getattr(first, name), name
        assert job.jaxft["config"] == first.jaxft["config"] and job.jaxft["suffix"] == first.jaxft["suffix"]


def test_checkpoints_and_results_are_downloaded(visit, ids):
    page = visit(f"#/job/{ids['done']}")
    for name in ("step-160.tar", "step_metrics.csv"):
        with page.expect_download() as started:
            page.get_by_role("button", name=f"Download {name}", exact=True).click()
        content = Path(started.value.path()).read_bytes()
        assert started.value.suggested_filename == name
        if name.endswith(".tar"):
            assert tarfile.open(fileobj=io.BytesIO(content)).getnames() == ["adapter_config.json"]
        else:
            assert content.count(b"\n") == STEPS + 1
    page.get_by_role("link", name="Try step 160").click()
    assert page.get_by_label("Model B, its name").input_value().endswith(":ckpt-step-160")


def test_two_models_answer_beside_each_other(visit, client):
    chat_stub.ANSWERED.clear()
    page = visit("#/playground?a=tiny")
    tuned = next(one.id for one in client.models.list() if one.jaxft["kind"] == "adapter")
    page.get_by_label("Model B, its name").select_option(tuned)
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_text("Sampling").click()
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Prompt").fill(f"one two {MARKUP}")
    page.get_by_label("Prompt").press("Control+Enter")
    page.get_by_text("ended by stop, 9 prompt tokens, 5 tokens").nth(1).wait_for()
    for side in "ab":
        answer = page.locator(f"#answer-{side}")
        assert answer.inner_text().strip() == f"one two {MARKUP}"
        shares = [one.get_attribute("title") for one in answer.locator("span").all()]
        assert shares == ["95.0%", "70.0%", "40.0%", "20.0%", "1.0%"]
    assert [body["model"] for body in chat_stub.ANSWERED] == [MODEL, tuned]
    assert chat_stub.ANSWERED[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert {**chat_stub.ANSWERED[0], "messages": 0, "model": 0} == {
        "messages": 0, "model": 0, "stream": True, "stream_options": {"include_usage": True}, "logprobs": True,
        "temperature": 0.5, "top_p": 1, "max_completion_tokens": 256,
    }  # fmt: skip
    page.get_by_label("Prompt").fill("now fail")
    page.get_by_role("button", name="Send to both").click()
    assert page.get_by_role("alert").filter(has_text="The engine has died").nth(1).inner_text()
    page.get_by_label("Prompt").fill("do wait")
    page.get_by_role("button", name="Send to both").click()
    page.locator("#answer-b").get_by_text("wait").wait_for()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("ended by you").nth(1).wait_for()


def test_a_key_for_answers_alone_sees_no_jobs(visit, server):
    with open_state(server.state, exclusive=False) as state:
        key = add_key(state.db, "asks", ["answer"])
    page = visit("#/playground", key)
    page.get_by_text("This key may not see jobs.").wait_for()
    page.get_by_label("Prompt").fill("one two")
    page.get_by_role("button", name="Send to both").click()
    page.get_by_text("ended by stop").nth(1).wait_for()
    page.get_by_role("navigation").get_by_role("link", name="Jobs").click()
    page.get_by_role("alert").filter(has_text="it needs the scope train").wait_for()


def test_a_model_is_deleted_after_a_question(visit, client):
    page = visit("#/models")
    name = next(one.id for one in client.models.list() if one.id.endswith(":ckpt-step-80"))
    for answer, left in (("Back", 1), ("Delete", 0)):
        page.get_by_role("button", name=f"Delete {name}", exact=True).click()
        page.get_by_role("dialog").get_by_role("button", name=answer, exact=True).click()
        page.get_by_role("dialog").wait_for(state="detached")
        if not left:
            page.get_by_role("heading", name=name, exact=True).wait_for(state="detached")
        assert sum(one.id == name for one in client.models.list()) == left
    assert page.get_by_role("button", name=re.compile("^Delete tiny")).count() == 0


def test_strangers_text_is_inert_everywhere(visit, ids):
    page = visit(f"#/job/{ids['done']}")
    page.get_by_text(f"{MARKUP}.jsonl").wait_for()
    page.get_by_text("Where is my parcel?").first.wait_for()
    for where in (f"#/job/{ids['failed']}", "#/jobs"):
        page.goto(page.url.partition("#")[0] + where)
        page.get_by_text(f"line 3: the row has no answer: {MARKUP}").first.wait_for()
        assert page.evaluate("document.querySelectorAll('main img, main script, main b').length") == 0
    # A view of an unknown job, and an address that is no view, are only text too.
    page.goto(page.url.partition("#")[0] + "#/job/%3Cimg%20src=x%20onerror=alert(1)%3E%")
    page.get_by_role("alert").filter(has_text="There is no fine-tuning job").wait_for()
    assert page.evaluate("document.querySelectorAll('img').length") == 0


def test_a_job_that_is_left_before_it_came_loads_nothing_more(visit, ids):
    """Its answer comes when another address is open, whose job there is not."""
    page, held, looks = visit(), [], []
    page.route(re.compile(f"/jobs/{ids['done']}$"), lambda route: held.append(route))
    page.on("request", lambda one: looks.append(one.url) if one.url.endswith("/jaxft/system") else None)
    base = page.url.partition("#")[0]
    page.goto(f"{base}#/job/{ids['done']}")
    while not held:
        page.wait_for_timeout(10)
    page.goto(f"{base}#/job/unknown")
    page.get_by_role("alert").filter(has_text="There is no fine-tuning job").wait_for()
    looks.clear()
    with page.expect_response(re.compile(f"/jobs/{ids['done']}$")):
        held[0].continue_()
    page.wait_for_timeout(200)
    assert not looks


def test_the_page_is_drawn_at_most_four_times_a_second_and_not_while_hidden(visit):
    page = visit()
    page.clock.install()
    page.clock.pause_at("2030-01-01")
    page.evaluate(
        """async () => {
          const { paced } = await import('/page/pace.js');
          window.drawn = 0;
          window.ask = paced(() => (window.drawn += 1));
          window.hide = (hidden) => {
            Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });
            document.dispatchEvent(new Event('visibilitychange'));
          };
        }"""
    )
    for _ in range(39):
        page.evaluate("ask(); ask()")
        page.clock.run_for(25)
    assert 3 <= page.evaluate("drawn") <= 4
    page.evaluate("drawn = 0; hide(true); ask()")
    page.clock.run_for(5000)
    assert page.evaluate("(ask(), drawn)") == 0
    page.evaluate("hide(false)")
    assert page.evaluate("drawn") == 1


def test_the_page_survives_a_restart_of_the_server(visit, tmp_path):
    with in_thread(tmp_path / "state", str(ASSETS / "smoke")) as server:
        job = create(server.client(), rows(steps=4, wait=2), suffix="through")
        page = visit(f"#/job/{job.id}", server.key, server.port)
        page.get_by_text("step 2 of 4, loss").wait_for()
        page.evaluate("window.before = 1")
        port = server.port
    page.get_by_text("The server does not answer.").first.wait_for()
    with in_thread(tmp_path / "state", str(ASSETS / "smoke"), port=port) as server:
        page.get_by_text("connected", exact=True).wait_for()
        until(server.client(), job.id, "succeeded")
        page.get_by_text("step 4 of 4, loss").wait_for()
        page.get_by_text("The job has successfully completed").wait_for()
        page.get_by_role("slider", name="Loss by step").press("End")
        assert page.get_by_role("slider", name="Loss by step").get_attribute("aria-valuenow") == "4"
        assert page.evaluate("window.before") == 1


VIEWS = {
    "jobs": ("#/jobs", "Jobs"), "new": ("#/new", "New job"), "job": ("#/job/{done}", "support-answers"),
    "examination": ("#/job/{waits}", "look-before"), "playground": ("#/playground?a=tiny", "Playground"),
    "models": ("#/models", "Models"), "system": ("#/system", "System"),
}  # fmt: skip


def prepare(page: Any, name: str) -> None:
    """Brings a view to what its picture shows."""
    if name == "new":
        page.locator("option", has_text=MODEL).wait_for(state="attached")
    if name == "models":
        page.get_by_role("link", name=f"Try {MODEL}").wait_for()
    if name == "jobs":
        page.get_by_role("link", name="support-answers").first.wait_for()
    if name == "job":
        page.get_by_role("link", name="Try step 240").wait_for()
        page.get_by_role("slider", name="Smoothing").fill("0.8")
        page.get_by_role("slider", name="Loss by step").press("End")
    if name == "examination":
        page.get_by_text("about 8 min").wait_for()
        page.evaluate("document.getElementById('config').scrollIntoView()")
    if name == "playground":
        page.get_by_label("Prompt").fill("Where is my parcel? It was sent on Friday, and I have heard nothing since.")
        page.get_by_role("button", name="Send to both").click()
        page.get_by_text("ended by stop").nth(1).wait_for()
    if name == "system":
        page.get_by_text("Memory of the server").wait_for()


def test_views_are_accessible_in_both_schemes_and_fit_a_narrow_screen(visit, ids):
    from axe_playwright_python.sync_playwright import Axe

    page = visit()
    page.emulate_media(reduced_motion="reduce")
    for name, (where, title) in VIEWS.items():
        page.set_viewport_size(SIZE)
        page.goto(page.url.partition("#")[0] + where.format(**ids))
        heading(page, title)
        prepare(page, name)
        for scheme, rules in (("light", RULES), ("dark", ["color-contrast"])):  # nothing else differs
            page.emulate_media(color_scheme=scheme)
            found = Axe().run(page, options={"runOnly": rules})
            assert not found.violations_count, f"{name}, {scheme}: {found.generate_report()}"
            if os.environ.get("JAXFT_SCREENSHOTS"):
                take_picture(page, IMAGES / f"{name}-{scheme}.png")
        page.set_viewport_size({"width": 320, "height": 640})
        page.wait_for_function("document.documentElement.scrollWidth <= 320")


def take_picture(page: Any, path: Path) -> None:
    """A small PNG of what is in view."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def test_all_can_be_done_by_the_keyboard(visit):
    page = visit()
    page.get_by_role("link", name="support-answers").first.wait_for()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main" and page.url.endswith("#/jobs")
    page.get_by_role("navigation").get_by_role("link", name="Models").press("Enter")
    heading(page, "Models")
    assert page.evaluate("document.activeElement.tagName") == "H1"
    page.get_by_label("Colours").select_option("dark")
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    page.reload()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"


@pytest.mark.slow
def test_a_real_job_from_rows_to_its_adapter(visit, tmp_path):
    process = ServerProcess(tmp_path / "state", write_model(tmp_path / "model"), "jaxft.serving.worker")
    try:
        content = b"".join((ASSETS / "quickstart" / "train.jsonl").read_bytes().splitlines(keepends=True)[:8])
        page = visit("#/new", process.running.key, process.running.port)
        page.get_by_label("Rows to train on").set_input_files({"name": "a.jsonl", "mimeType": "", "buffer": content})
        page.get_by_label("Suffix").fill("real")
        page.get_by_label("Epochs").fill("2")
        page.get_by_label("Rows of a batch").fill("4")
        page.get_by_text("Further settings").click()
        page.get_by_label("Settings of the run").fill("adapter.r=4\ndata.max_length=400\ndata.packing=false")
        page.get_by_role("button", name="Upload and examine").click()
        page.get_by_text("Row 1, with what is trained on marked").wait_for(timeout=5 * SLOW_MS)
        assert page.locator("mark").first.inner_text() and page.get_by_text("known after two steps").is_visible()
        page.get_by_role("button", name="Start").click()
        heading(page, "real")
        page.get_by_text("The job has successfully completed").wait_for(timeout=5 * SLOW_MS)
        page.get_by_role("slider", name="Loss by step").press("End")
        assert page.get_by_role("slider", name="Loss by step").get_attribute("aria-valuenow") == "4"
        # The engine answers, once by the base and once by the adapter.
        page.get_by_role("link", name="Try step 4").click()
        page.get_by_text("Sampling").click()
        page.get_by_label("Tokens at most").fill("5")
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("Prompt").fill("Who are you?")
        page.get_by_role("button", name="Send to both").click()
        page.get_by_text(re.compile("ended by (length|stop), .* tokens?,")).nth(1).wait_for(timeout=5 * SLOW_MS)
        for side in "ab":
            shares = [float(one.get_attribute("title")[:-1]) for one in page.locator(f"#answer-{side} span").all()]
            assert len(shares) == 5 and all(0 < share <= 100 for share in shares)
        page.get_by_role("navigation").get_by_role("link", name="System").click()
        page.get_by_role("heading", name="Engines of answers").wait_for()
    finally:
        assert process.end(signal.SIGTERM) == 0
