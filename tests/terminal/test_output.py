"""Output for people that fails in each way: the run that writes it goes on."""

import io
import os
import pty
import subprocess
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from jaxft import cli
from jaxft.cli import streams
from jaxft.cli.errors import explained
from jaxft.cli.streams import only_ascii, prepare_streams
from jaxft.errors import ExitCode
from jaxft.terminal.console import SafeConsole
from jaxft.terminal.output import lasting
from jaxft.training.log import RunLog, read_metrics


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", encoding="utf-8")


def gone_terminal():
    """A terminal whose other end is closed: the kernel answers EIO, as after a lost connection."""
    parent, child = pty.openpty()
    file = open(child, "w", encoding="utf-8")
    os.close(parent)
    return file


def closed_file():
    file = open(os.devnull, "w", encoding="utf-8")
    file.close()
    return file


def full_disk():
    return open("/dev/full", "w", encoding="utf-8")


@pytest.mark.parametrize("broken", [closed_pipe, gone_terminal, closed_file, full_disk])
@pytest.mark.parametrize("terminal", [False, True])
def test_a_run_outlives_its_output_and_says_so_once(tmp_path, capsys, broken, terminal):
    console = Console(file=broken(), force_terminal=terminal, force_interactive=terminal)
    with RunLog(tmp_path, total_steps=4, resume_step=None, console=console) as log:
        for step in range(1, 5):
            log.step(step, {"loss": 1.0 / step})
            log.note("x" * 10_000)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("the output cannot be written") == 1
    console.print("more")
    console.file.close()  # as Python does when it ends: nothing may fail then


def test_nobody_is_left_to_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", closed_pipe())
    console = lasting(Console(file=closed_pipe()))
    console.print("a word")
    monkeypatch.setattr(sys, "stderr", None)
    lasting(Console(file=closed_pipe())).print("a word")


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "\\xe9 \\u4e2d \\ud800"), ("latin-1", "é \\u4e2d \\ud800")])
def test_what_the_encoding_lacks_is_escaped(encoding, shown, monkeypatch):
    written = io.BytesIO()
    console = lasting(Console(file=io.TextIOWrapper(written, encoding=encoding), width=80))
    console.print("é 中 \ud800", markup=False)
    assert written.getvalue().decode(encoding).strip() == shown
    # The same for every command that writes to standard output.
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    prepare_streams()
    print("é 中 \ud800", flush=True)
    assert written.getvalue().decode(encoding).strip() == shown and only_ascii()


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    program = (
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(Path(streams.__file__).parents[2])!r})\n"
        f"runpy.run_path({streams.__file__!r})['prepare_streams']()\n"
        f"number = os.open({str(tmp_path / 'data')!r}, os.O_WRONLY | os.O_CREAT)\n"
        "os.write(2, b'of a library')\n"
        "sys.exit(0 if number > 2 else 1)\n"
    )
    shell = f'exec {sys.executable} -c "$PROGRAM" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", shell], env={"PROGRAM": program}, check=False).returncode == 0
    assert (tmp_path / "data").read_bytes() == b""


@pytest.mark.parametrize("broken", [closed_pipe, gone_terminal, full_disk])
def test_nobody_who_reads_the_message_does_not_change_the_exit_code(monkeypatch, broken):
    monkeypatch.setattr(cli, "show_progress", lambda: None)  # which would keep this stream
    monkeypatch.setattr(sys, "stderr", broken())
    assert cli.main(["train"]) == ExitCode.REFUSED  # without a model
    sys.stderr.close()  # as Python does when it ends


def test_a_reader_who_has_read_enough_ends_a_command_with_0(monkeypatch):
    monkeypatch.setattr(sys, "stdout", closed_pipe())
    for write in (print, SafeConsole().print):
        with pytest.raises(BrokenPipeError) as closed:
            write("a line that nobody reads")
            sys.stdout.flush()
        assert explained("data", closed.value) == ExitCode.DONE
        sys.stdout.close()  # as Python does when it ends
        monkeypatch.setattr(sys, "stdout", closed_pipe())
    # A connection that broke is not standard output.
    monkeypatch.setattr(sys, "stdout", open(os.devnull, "w", encoding="utf-8"))
    assert explained("data", BrokenPipeError(32, "Broken pipe")) == ExitCode.REFUSED


def test_standard_output_that_cannot_be_flushed_fails_once(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", full_disk())
    print("kept back until the end")
    with pytest.raises(OSError, match="No space left") as full:
        sys.stdout.flush()
    assert explained("data", full.value) == ExitCode.REFUSED
    sys.stdout.close()


class Failing:
    """tensorboardX's event writer on a disk that is full, or where it cannot even begin."""

    def __init__(self, *_):
        self.rows = 0

    def write_event(self, event):
        self.rows += 1
        if self.rows > 2:
            raise OSError(28, "No space left on device")

    def flush(self):
        pass

    def close(self):
        raise OSError(28, "No space left on device")


def test_event_files_that_fail_are_told_once_and_end_nothing(tmp_path, monkeypatch):
    writer = pytest.importorskip("tensorboardX.event_file_writer")
    monkeypatch.setattr(writer, "EventsWriter", Failing)
    console = Console(file=io.StringIO(), width=300)
    with RunLog(tmp_path / "full", total_steps=4, resume_step=None, console=console) as log:
        for step in range(1, 5):
            log.step(step, {"loss": 1.0})
    assert len(read_metrics(tmp_path / "full")) == 4
    assert console.file.getvalue().count("TensorBoard files cannot be written (OSError: [Errno 28]") == 1
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "tensorboard").write_text("in the way")
    with RunLog(tmp_path / "file", total_steps=1, resume_step=None, console=console) as log:
        log.step(1, {"loss": 1.0})
    assert len(read_metrics(tmp_path / "file")) == 1


def test_the_report_of_a_run_that_goes_on_is_made_once_a_minute(tmp_path):
    from jaxft.runs.report import KeptReport

    seconds = [0.0]
    report = KeptReport(tmp_path, pytest.fail, lambda: seconds[0])
    made = []
    for seconds[0] in (10.0, 59.0, 60.0, 61.0, 119.0, 121.0):
        report.refresh()
        made.append((tmp_path / "report.html").exists())
        (tmp_path / "report.html").unlink(missing_ok=True)
    assert made == [False, False, True, False, False, True]


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    from jaxft.runs.report import KeptReport, keeping

    told = []
    report = KeptReport(tmp_path, told.append)
    (tmp_path / "report.html").mkdir()
    assert report.write() == {} and report.write() == {}
    assert len(told) == 1 and "no report was written (IsADirectoryError" in told[0]
    (tmp_path / "report.html").rmdir()
    assert report.write() == {"report": "report.html", "loss_plot": "loss.png"}
    monkeypatch.setattr(keeping, "write_report", types.SimpleNamespace())  # not callable: an error of a library
    assert report.write() == {} and len(told) == 2
