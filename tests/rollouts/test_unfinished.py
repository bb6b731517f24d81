"""The file of answers that are not all drawn: it goes on from whole lines, and never replaces a file of others."""

import json

import pytest

from jaxft.errors import ConfigError
from jaxft.rollouts.unfinished import Unfinished
from jaxft.runs.sample import check_outputs

SETTINGS = {"config": {"seed": 0}}


def test_an_interrupted_call_goes_on_after_its_last_whole_record(tmp_path):
    path = tmp_path / "best.jsonl.jaxft.partial"
    records = [{"rows": [{"completion": "one\u2028line\x85 of \x1c text"}]}, {"rows": [{"completion": "two"}]}]
    Unfinished(path, SETTINGS).add(records)
    with open(path, "a") as file:
        file.write('{"rows": [{"compl')
    again = Unfinished(path, SETTINGS)
    assert again.rows == 2 and list(again.records()) == records
    path.write_bytes(path.read_bytes()[:7])  # killed in the first line
    assert Unfinished(path, SETTINGS).rows == 0


@pytest.mark.parametrize("content", [b"mine", b"mine\n", b'{"rows": 1}\n', b"\xff\xfe\n", b"[" * 10**5])
def test_a_file_of_others_is_not_replaced(tmp_path, content):
    path = tmp_path / "best.jsonl.jaxft.partial"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is in the way.*Move it elsewhere"):
        Unfinished(path, SETTINGS)
    assert path.read_bytes() == content


def test_other_settings_are_named(tmp_path):
    path = tmp_path / "best.jsonl.jaxft.partial"
    Unfinished(path, SETTINGS)
    with pytest.raises(ConfigError, match="seed: was 0, now 1"):
        Unfinished(path, {"config": {"seed": 1}})
    assert json.loads(path.read_text()) == {"settings": SETTINGS}


@pytest.mark.parametrize("line", ['{"settings": {', '{"settings": {}} x', '{"settings": {"a": ' + "[" * 10**5])
def test_a_damaged_first_line_is_told(tmp_path, line):
    path = tmp_path / "best.jsonl.jaxft.partial"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError, match="line 1 is damaged.*Delete the file to begin again"):
        Unfinished(path, SETTINGS)
    assert path.read_text() == line + "\n"


@pytest.mark.parametrize("line", ["{", "3", '{"rows": 3}', "[" * 10**5])
def test_a_damaged_record_is_told_by_its_line(tmp_path, line):
    path = tmp_path / "best.jsonl.jaxft.partial"
    Unfinished(path, SETTINGS).add([{"rows": []}])
    with open(path, "a") as file:
        file.write(line + "\n")
    with pytest.raises(ConfigError, match="line 3 is damaged.*Delete the file to begin again"):
        list(Unfinished(path, SETTINGS).records())


def test_outputs_that_cannot_be_written_are_refused_before_the_model_is_loaded(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for to, pairs, overwrite, message in (
        ("folder", None, True, "is a folder, and a file is written: name a file in it"),
        ("file", None, False, "is there already"),
        ("a", "a", False, "cannot both be written"),
        ("absent/a", None, False, "is no folder, so .*make it first"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_outputs(str(tmp_path / to), pairs and str(tmp_path / pairs), overwrite=overwrite)
    check_outputs(str(tmp_path / "file"), None, overwrite=True)
