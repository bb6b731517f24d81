"""The record of a run: whole after a kill, valid JSON, readable by others."""

import io
import json
import struct
import sys
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jaxft.errors import DataError, JaxftError
from jaxft.training.log import TIMING_KEYS, RunLog, read_metrics

TOTAL = 6


def plain_console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def run(folder: Path, first: int, last: int, resume_step: int | None, *, pace: float = 100.0) -> RunLog:
    """Log steps first..last as a loop would; the caller closes, or leaves it open as a kill does."""
    log = RunLog(folder, total_steps=TOTAL, resume_step=resume_step, quiet=True)
    for step in range(first, last + 1):
        log.step(
            step, {"loss": 1 / step, "learning_rate": 1e-4 / 3, "num_tokens": 64 * step, "tokens_per_second": pace}
        )
        if step % 2 == 0:
            log.eval(step, {"eval_loss": 2 / step})
    return log


def timeless(folder: Path) -> list[str]:
    return [json.dumps({k: v for k, v in row.items() if k not in TIMING_KEYS}) for row in read_metrics(folder)]


def test_rows_come_back_as_logged(tmp_path):
    with RunLog(tmp_path, total_steps=2, resume_step=None, quiet=True) as log:
        log.step(1, {"loss": np.float32(0.5), "num_tokens": np.int64(7), "learning_rate": 1e-4})
        log.eval(1, {"eval_loss": 0.25})
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 0.5, "num_tokens": 7, "learning_rate": 1e-4},
        {"step": 1, "eval_loss": 0.25},
    ]


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    log = run(tmp_path, 1, 1, None)
    assert len(read_metrics(tmp_path)) == 1
    log.close()


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6}', "\x00\x00\x00"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, torn):
    run(tmp_path / "whole", 1, TOTAL, None).close()
    killed = run(tmp_path / "cut", 1, 5, None)
    with open(tmp_path / "cut" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(torn)
    run(tmp_path / "cut", 4, TOTAL, 3, pace=55.5).close()
    killed.close()
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    pace = [row["tokens_per_second"] for row in read_metrics(tmp_path / "cut") if "loss" in row]
    assert pace == [100.0] * 3 + [55.5] * 3


def test_without_timing_keys_the_files_are_equal_byte_for_byte(tmp_path):
    run(tmp_path / "whole", 1, TOTAL, None).close()
    run(tmp_path / "cut", 1, 5, None).close()
    run(tmp_path / "cut", 3, TOTAL, 2).close()
    assert (tmp_path / "cut/metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()


def test_a_last_line_whose_newline_was_lost_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}')
    run(tmp_path, 3, 3, 2).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_run_without_checkpoint_starts_its_record_anew(tmp_path):
    run(tmp_path, 1, 5, None).close()
    run(tmp_path, 1, 1, None).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_a_torn_last_line_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("damage", ["{broken", "[1, 2]", '{"loss": 1.0}'])
def test_damage_before_the_last_line_is_refused(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(DataError, match="line 2 of 3 is not a JSON object with a step"):
        read_metrics(tmp_path)
    with pytest.raises(DataError, match="line 2 of 3"):
        RunLog(tmp_path, total_steps=4, resume_step=3, quiet=True)


def test_a_folder_without_metrics_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no metrics\.jsonl in"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_non_finite_values_are_refused_by_key_and_step(tmp_path, value):
    with RunLog(tmp_path, total_steps=2, resume_step=None, quiet=True) as log:
        with pytest.raises(JaxftError, match=r"'grad_norm' is -?(nan|inf) at step 2"):
            log.step(2, {"loss": 1.0, "grad_norm": value})
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("value", ["0.5", None, True, np.zeros(2)])
def test_other_things_than_numbers_are_refused(tmp_path, value):
    with RunLog(tmp_path, total_steps=2, resume_step=None, quiet=True) as log:
        with pytest.raises(TypeError, match="'loss' at step 1"):
            log.step(1, {"loss": value})


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    console, ticks = plain_console(), count(step=1.5)
    with RunLog(tmp_path, total_steps=160, resume_step=None, console=console, clock=lambda: next(ticks)) as log:
        log.step(39, {"loss": 0.9, "learning_rate": 1.9e-4, "tokens_per_second": 9.87})
        log.step(40, {"loss": 0.81234, "learning_rate": 1.9e-4, "grad_norm": 1.0, "tokens_per_second": 1421.6})
        log.eval(40, {"eval_loss": 0.5, "eval_seconds": 3.0})
        log.note("saved [bold]40[/bold] " + 100 * "x")
        log.step(160, {"loss": 0.1})
    assert console.file.getvalue().splitlines() == [
        "step 39/160  loss 0.9000  lr 1.9e-04  9.9 tok/s",
        "step 40/160  loss 0.8123  lr 1.9e-04  1,422 tok/s  3:00 left",
        "eval at step 40  eval_loss 0.5000",
        "saved [bold]40[/bold] " + 100 * "x",
        "step 160/160  loss 0.1000",
    ]


def test_hours_are_told_as_hours(tmp_path):
    console, ticks = plain_console(), count(step=60.0)
    with RunLog(tmp_path, total_steps=100, resume_step=None, console=console, clock=lambda: next(ticks)) as log:
        log.step(1, {})
        log.step(2, {})
    assert console.file.getvalue().endswith("step 2/100  1:38:00 left\n")


def test_a_terminal_gets_a_live_line(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=100, color_system=None)
    with RunLog(tmp_path, total_steps=4, resume_step=2, console=console) as log:
        log.step(3, {"loss": 0.8123})
        log.note("a [word]")
    shown = console.file.getvalue()
    assert "step 2/4" in shown and "step 3/4" in shown and "loss 0.8123" in shown and "a [word]" in shown


def test_quiet_says_nothing(tmp_path, capsys):
    console = plain_console()
    with RunLog(tmp_path, total_steps=4, resume_step=None, console=console, quiet=True) as log:
        log.step(1, {"loss": 1.0})
        log.note("a word")
    assert console.file.getvalue() == "" and capsys.readouterr() == ("", "")


def test_an_error_in_the_loop_closes_the_log_and_goes_on(tmp_path):
    with pytest.raises(RuntimeError, match="from the loop"):
        with RunLog(tmp_path, total_steps=4, resume_step=None, quiet=True) as log:
            raise RuntimeError("from the loop")
    log.close()
    with pytest.raises(ValueError, match="closed file"):
        log.step(1, {"loss": 1.0})


def test_without_tensorboardx_it_says_so_once(tmp_path, monkeypatch):
    for module in ("tensorboardX", "tensorboardX.event_file_writer"):
        monkeypatch.setitem(sys.modules, module, None)
    console = plain_console()
    with RunLog(tmp_path, total_steps=4, resume_step=None, console=console) as log:
        log.step(1, {"loss": 1.0})
        log.step(2, {"loss": 0.5})
    assert console.file.getvalue().count("tensorboardX is not installed") == 1
    assert not (tmp_path / "tensorboard").exists()
    assert len(read_metrics(tmp_path)) == 2


def events(folder: Path) -> list:
    """All events in the order in which TensorBoard reads them: file by file, in TFRecord framing."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted((folder / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            # 8 bytes of length and 4 of its checksum stand before the payload, 4 of checksum after it.
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def surviving(folder: Path) -> dict[tuple[str, int], float]:
    """Scalars as TensorBoard shows them: a session start discards what lies at its step or after."""
    from tensorboardX.proto.event_pb2 import SessionLog

    scalars: dict[tuple[str, int], float] = {}
    for event in events(folder):
        if event.session_log.status == SessionLog.START:
            scalars = {key: value for key, value in scalars.items() if key[1] < event.step}
        for value in event.summary.value:
            scalars[value.tag, event.step] = value.simple_value
    return scalars


def test_tensorboard_files_hold_the_same_figures(tmp_path):
    run(tmp_path, 1, TOTAL, None).close()
    logged = {(k, row["step"]): v for row in read_metrics(tmp_path) for k, v in row.items() if k != "step"}
    shown = surviving(tmp_path)
    assert shown.keys() == logged.keys()
    # Event files hold float32.
    assert all(shown[key] == pytest.approx(value, rel=1e-6) for key, value in logged.items())


def test_tensorboard_forgets_the_steps_that_are_taken_again(tmp_path):
    killed = run(tmp_path / "cut", 1, 5, None)
    run(tmp_path / "cut", 4, TOTAL, 3, pace=55.5).close()
    run(tmp_path / "whole", 1, TOTAL, None).close()
    shown = surviving(tmp_path / "cut")
    assert shown.keys() == surviving(tmp_path / "whole").keys()
    assert shown["tokens_per_second", 3] == 100.0 and shown["tokens_per_second", 5] == 55.5
    killed.close()
