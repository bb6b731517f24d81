"""Which engine answers for a model, models that are deleted, and training beside answers, with stand-ins for both."""

import json
from collections.abc import Iterator

import openai
import pytest
from answering import SMOKE, Served, serving
from servers import MODEL, create, rows, until, wait_for

from jaxft.errors import ConfigError
from jaxft.serving.engines.limits import Limits
from jaxft.serving.engines.target import is_plain
from jaxft.serving.http.errors import ApiError
from jaxft.serving.settings import ServeSettings
from jaxft.serving.storage.uses import Uses


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    with serving(folder) as running:
        yield Served(running, folder)


def tuned(served, **config):
    """(name, folder) of a new tuned model with this adapter_config.json."""
    job = until(served.client, create(served.client, rows(steps=1)).id, "succeeded")
    folder = served.running.state / "models" / f"{job.id}-final"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return job.fine_tuned_model, folder


def test_lora_answers_beside_its_base_and_other_adapters_alone(served):
    name, folder = tuned(served, peft_type="LORA", r=4)
    assert served.chat(model=name).model == name
    assert served.asked()["adapter"] == {"id": name, "folder": str(folder)}
    other, alone = tuned(served, peft_type="VERA", r=4)
    assert served.chat(model=other).choices and served.asked()["adapter"] is None
    spec = json.loads((served.folder / "spec.json").read_text())
    assert (spec["model"], spec["base"], spec["adapters"]) == (str(alone), SMOKE, 0)
    engines = served.client.get("/jaxft/system", cast_to=object)["engines"]
    assert [engine["model"] for engine in engines] == [MODEL, other]
    # What the engine itself does not take beside others gets an engine of its own as well.
    third, folder = tuned(served, peft_type="LORA", r=4)
    with pytest.raises(openai.BadRequestError, match="no") as caught:
        served.chat(model=third, todo={"refuse": "serve_alone"})
    assert caught.value.code == "serve_alone" and served.asked()["adapter"] is None
    assert json.loads((served.folder / "spec.json").read_text())["model"] == str(folder)


PLAIN = {"peft_type": "LORA", "r": 8}


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (PLAIN, True), (PLAIN | {"rank_pattern": {"q": 4}, "use_dora": False}, True), (PLAIN | {"r": 9}, False),
        (PLAIN | {"rank_pattern": {"q": 16}}, False), (PLAIN | {"use_dora": True}, False), ({"r": 8}, False),
        (PLAIN | {"modules_to_save": ["lm_head"]}, False), ({"peft_type": "IA3"}, False),
    ],
)  # fmt: skip
def test_adapters_that_are_plain(tmp_path, config, plain):
    assert not is_plain(tmp_path, 8)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert is_plain(tmp_path, 8) is plain


def test_a_deleted_model_ends_its_answers_first(served):
    name, folder = tuned(served, peft_type="LORA", r=4)
    stream = iter(served.chat(model=name, todo={"pieces": ["a", "b"], "wait": True}, stream=True))
    assert next(stream).choices[0].delta.role == "assistant"
    served.client.models.delete(name)
    with pytest.raises(openai.NotFoundError) as caught:
        served.chat(model=name)
    assert caught.value.code == "model_not_found" and folder.is_dir()
    (served.folder / "go").touch()
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "ab"
    (served.folder / "go").unlink()
    wait_for(lambda: not folder.exists(), "the end of the folder")


def test_engines_give_way_to_training_where_it_has_the_devices(tmp_path):
    with serving(tmp_path, while_training="wait") as running:
        served = Served(running, tmp_path)
        slow = iter(served.chat(todo={"pieces": ["a"], "wait": True}, stream=True))
        next(slow)
        job = create(served.client, rows(wait=1, steps=1))
        refused = wait_for(lambda: refusal(served), "a refusal")
        assert refused.status_code == 503 and refused.code == "training"
        assert refused.response.headers["x-should-retry"] == "false"
        assert served.client.fine_tuning.jobs.retrieve(job.id).status != "running", "an answer is open"
        (tmp_path / "go").touch()
        assert [chunk.choices[0].delta.content for chunk in slow] == ["a", None]
        until(served.client, job.id, "running")
        assert served.engine()["phase"] == "stopped" and refusal(served)
        (running.state / "jobs" / job.id / "go").touch()
        until(served.client, job.id, "succeeded")
        wait_for(lambda: refusal(served) is None, "answers after training")


def refusal(served):
    try:
        served.chat(todo={"pieces": []})
    except openai.InternalServerError as error:
        return error
    return None


def test_limits_of_the_queue():
    limits = Limits(slots=2, queue=4)
    for key, choices in (("a", 3), ("b", 2), ("c", 1)):
        limits.enter(key, choices, 10)
    with pytest.raises(ApiError, match="queue") as caught:
        limits.enter("d", 1, 10)
    assert caught.value.status == 429 and 1 <= int(caught.value.headers["retry-after"]) <= 60
    limits.leave("b", 2, 10)
    with pytest.raises(ApiError, match="This key"):
        limits.enter("a", 2, 10)
    with pytest.raises(ApiError, match="may ask for 4") as caught:
        limits.enter("e", 5, 10)
    assert caught.value.status == 400
    with pytest.raises(ApiError, match="queue"):
        limits.enter("e", 1, 2**30)
    limits.enter("e", 1, 10)
    assert limits.total == 5 and limits.by_key == {"a": 3, "c": 1, "e": 1}


def test_folders_in_use_are_freed_by_the_last_user():
    uses, freed = Uses(), list[str]()
    uses.when_free("a", lambda: freed.append("a"))
    uses.begin("b"), uses.begin("b")
    uses.when_free("b", lambda: freed.append("b"))
    uses.end("b")
    assert freed == ["a"]
    uses.end("b")
    assert freed == ["a", "b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"slots": 0}, "--slots"), ({"adapters": -1}, "--adapters"), ({"max_rank": 0}, "max_rank")],
)
def test_settings_that_cannot_be(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        ServeSettings(models={MODEL: SMOKE}, state=tmp_path, **settings).check()
