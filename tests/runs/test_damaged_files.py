"""Damaged files of a run folder: what can be made again is, with a word; the rest is refused with the file."""

import json
import os

import pytest
from runs.test_folder import checkpoint, config_of, start

from jaxft.errors import CheckpointError, ConfigError
from jaxft.files import run_folder
from jaxft.files.deadlines import within
from jaxft.runs.folder import chat_template, run_config
from jaxft.runs.identity.record import read_record
from jaxft.runs.report.files import read_json as read_for_report
from jaxft.runs.scores import scores_of
from jaxft.training.log import RunLog, spans

DAMAGE = {
    "cut": '{"jaxft_run": 1, "id": "x", "mod',
    "empty": "",
    "nested": "[" * 200_000,
    "a list": "[1]",
    "a number": "3",
    "not UTF-8": b"\xff\xfe{",
}  # fmt: skip


def damage(path, kind):
    path.write_bytes(DAMAGE[kind] if isinstance(DAMAGE[kind], bytes) else DAMAGE[kind].encode())


def with_settings(folder, config, step=4):
    """A whole step that says with which settings it was saved."""
    checkpoint(folder, step)
    (folder / "checkpoints" / str(step) / "meta").mkdir()
    meta = {"layout": {}, "metrics": {}, "extra": {"step": step, "config": config.to_dict()}}
    (folder / "checkpoints" / str(step) / "meta" / "metadata").write_text(json.dumps(meta))


@pytest.mark.parametrize("kind", [*DAMAGE, "deleted"])
def test_the_config_is_taken_from_the_newest_checkpoint(tmp_path, caplog, kind):
    config = config_of(tmp_path)
    start(config)
    with_settings(tmp_path, config)
    (tmp_path / "config.json").unlink() if kind == "deleted" else damage(tmp_path / "config.json", kind)
    assert run_config(tmp_path) == config
    with pytest.raises(ConfigError, match=r"other settings:\n  seed: was 0, now 5"):
        start(config_of(tmp_path, seed=5))
    start(config)
    assert "the settings are those that step 4 was saved with" in caplog.text
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 0


def test_without_settings_in_the_checkpoint_the_config_is_asked_for(tmp_path):
    start(config_of(tmp_path))
    checkpoint(tmp_path)
    damage(tmp_path / "config.json", "cut")
    with pytest.raises(ConfigError, match="step 4 of the checkpoints does not say.*Restore the file"):
        start(config_of(tmp_path))


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_scores_and_data_are_left_out_with_a_word(tmp_path, caplog, kind):
    for name in (run_folder.SCORES, run_folder.DATA):
        damage(tmp_path / name, kind)
        assert run_folder.read_if_whole(tmp_path / name) == {}
        assert str(tmp_path / name) in caplog.text
        assert read_for_report(tmp_path / name)[0] == {}
    assert scores_of(tmp_path) == {}


def test_scores_with_values_of_wrong_types_are_left_out_with_a_word(tmp_path, caplog):
    whole = {"key": "k", "base": {"total": 3, "correct": 1, "value": 0.3}, "base_answers": ["a"]}
    for name, value in {"base": 3, "base_answers": [1], "tuned": {"total": "3"}}.items():
        run_folder.write_json(tmp_path / run_folder.SCORES, whole | {name: value})
        assert scores_of(tmp_path) == {} and "wrong types" in caplog.text
    run_folder.write_json(tmp_path / run_folder.SCORES, whole)
    assert scores_of(tmp_path) == whole and scores_of(tmp_path / "absent") == {}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_mark_is_refused_with_the_mend_and_the_mend_works(tmp_path, kind):
    config = config_of(tmp_path)
    start(config)
    damage(tmp_path / run_folder.MARK, kind)
    with pytest.raises(CheckpointError, match=r"jaxft_run.json cannot be read.*Delete it"):
        start(config)
    (tmp_path / run_folder.MARK).unlink()
    start(config)


FIELDS = {
    "steps": "8", "reads": [1], "exports": {"adapter": 3}, "history": ["x"], "ranked_after": None, "id": 3,
    "exports.model": {"model": [["x"]]}, "times": "x", "times.steps": {"steps": "x"}, "times.save": {"save": 10**400},
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_the_mark_with_a_wrong_type_is_named(tmp_path, name):
    start(config_of(tmp_path))
    values = json.loads((tmp_path / run_folder.MARK).read_text())
    (tmp_path / run_folder.MARK).write_text(json.dumps(values | {name.partition(".")[0]: FIELDS[name]}))
    with pytest.raises(CheckpointError, match=f"wrong types in {name}"):
        read_record(tmp_path)


def test_a_chat_template_that_is_not_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is damaged.*Write the chat template"):
        chat_template(tmp_path)


def test_steps_without_a_manifest_alone_are_not_taken_for_a_new_run(tmp_path):
    config = config_of(tmp_path)
    start(config)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "4" / "_CHECKPOINT_METADATA").write_text("{}")
    with pytest.raises(CheckpointError, match=r"(?s)no whole step, but 4 without manifest.*python -c.*To begin anew"):
        start(config)
    assert (tmp_path / "checkpoints" / "4" / "_CHECKPOINT_METADATA").exists()
    checkpoint(tmp_path, 2)
    start(config)  # there is a step to go on from


LINES = {
    "nested": "[" * 200_000, "NaN": '{"step": 2, "loss": NaN}', "a text": '{"step": 2, "loss": "x"}',
    "no step": '{"step": true}', "beyond floats": f'{{"step": 2, "loss": {10**400}}}',
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_line_of_the_metrics_that_no_run_wrote_is_refused_by_its_number(tmp_path, line):
    line = LINES[line]
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match="line 2 of 3 is not a JSON object with a step"):
        RunLog(tmp_path, total_steps=3, resume_step=3, quiet=True)


def test_a_pipe_in_the_place_of_the_metrics_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    within(lambda: RunLog(tmp_path, total_steps=3, resume_step=3, quiet=True).close(), 300)
    assert (tmp_path / "metrics.jsonl").is_file()


def test_the_log_knows_how_many_rows_it_has(tmp_path):
    with RunLog(tmp_path, total_steps=9, resume_step=None, quiet=True) as log:
        for step in (1, 2, 3):
            log.step(step, {"loss": 1.0})
        assert log.rows == 3
    with RunLog(tmp_path, total_steps=9, resume_step=2, quiet=True) as log:
        assert log.rows == 2


def test_numbers_in_short():
    assert spans([1, 2, 3, 5, 10, 20, 30, 31]) == ["1 to 3", "5 to 10 by 5", "20 to 30 by 10", "31"]
    assert spans([]) == [] and spans([7]) == ["7"]
