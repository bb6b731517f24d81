"""The file of sampled answers is read line by line, whatever the answers hold, and damage is refused by its line."""

import json

import pytest

from jaxft.errors import DataError
from jaxft.rollouts.completions import CompletionsLog, read_completions

ANSWER = "one\u2028line\u2029of\x85text\x0b\x0c\x1c"  # at each of these, Python sees the end of a line
ROWS = [{"step": step, "completion": ANSWER} for step in (1, 2, 3)]


def write(folder, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "completions.jsonl").write_text(text, encoding="utf-8")


def test_answers_with_separators_of_lines_are_read_as_one(tmp_path):
    write(tmp_path, ROWS)
    with open(tmp_path / "completions.jsonl", "a") as file:
        file.write('{"step": 4, "compl')  # killed
    assert read_completions(tmp_path) == ROWS
    CompletionsLog(tmp_path, 2, say=print).flush()  # resumed from step 2
    assert read_completions(tmp_path) == ROWS[:2]


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": "1"}', "[" * 10**5, "\udcff"])
def test_a_line_that_no_run_wrote_is_refused_by_its_number(tmp_path, line):
    write(tmp_path, ROWS)
    content = (tmp_path / "completions.jsonl").read_bytes()
    (tmp_path / "completions.jsonl").write_bytes(line.encode(errors="surrogateescape") + b"\n" + content)
    with pytest.raises(DataError, match="line 1 of 4 is not a JSON object with a step.*Mend or delete"):
        CompletionsLog(tmp_path, 2, say=print)
    assert (tmp_path / "completions.jsonl").read_bytes().endswith(content)
