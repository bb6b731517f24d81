"""Errors of the system, of memory and of libraries at the command line: a sentence with the mend, and no traceback."""

import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import safetensors

import jaxft
from jaxft import cli
from jaxft.cli.causes import cause_of
from jaxft.cli.errors import explained
from jaxft.errors import ConfigError, ExitCode
from jaxft.files.atomic import write_text
from jaxft.system import REMEDIES, naming


def fail(kind, folder):
    """Provokes one error of the operating system within a folder."""
    file = folder / "file"
    file.write_text("x")
    if kind == "ENOTDIR":
        (file / "below").mkdir()
    if kind == "EISDIR":
        folder.open("w")
    if kind == "ENAMETOOLONG":
        (folder / ("n" * 256)).write_text("x")
    if kind == "ELOOP":
        (folder / "loop").symlink_to(folder / "loop")
        (folder / "loop").read_text()
    if kind == "ENOENT":
        (folder / "absent").read_text()
    if kind == "ENOSPC":
        with naming("/dev/full"), open("/dev/full", "w") as full:
            full.write("x")
    if kind == "ENOTEMPTY":
        (folder / "full").mkdir()
        (folder / "full" / "file").write_text("x")
        (folder / "full").rmdir()


@pytest.mark.parametrize("kind", ["ENOTDIR", "EISDIR", "ENAMETOOLONG", "ELOOP", "ENOENT", "ENOSPC", "ENOTEMPTY"])
def test_an_error_of_the_system_names_the_file_and_the_mend(kind, tmp_path, capsys):
    with pytest.raises(OSError) as caught:
        fail(kind, tmp_path)
    assert explained("train", caught.value) == ExitCode.REFUSED
    said = capsys.readouterr().err
    assert said.startswith("jaxft train: ") and "Traceback" not in said
    assert ("/dev/full" if kind == "ENOSPC" else str(tmp_path)) in said
    assert REMEDIES[getattr(errno, kind)] in said
    assert explained("train", caught.value, debug=True) == ExitCode.REFUSED
    assert "Traceback" in capsys.readouterr().err


def test_a_write_that_fails_within_a_file_names_it(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "config.json", "{}")
    assert cause_of(caught.value).startswith(f"{tmp_path / 'config.json'}: No space left on device. Make room")
    assert not list(tmp_path.iterdir())


def test_a_connection_that_is_refused_points_at_the_network():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(OSError) as caught:
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert "Check the address, the network and any proxy" in cause_of(caught.value)


def test_memory_that_the_system_does_not_give_is_no_error_of_the_program():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**62, np.uint8)
    assert "this process can have no more memory" in cause_of(caught.value, "train")
    assert "train.accumulation_steps" in cause_of(caught.value, "train")


def test_memory_of_devices_names_settings_of_the_command():
    import jax

    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.numpy.zeros(2**46, "int8")
    assert "model.remat=full" in cause_of(caught.value, "train")
    assert "--quantization=nf4-dq" in cause_of(caught.value, "generate")


def test_a_library_that_is_missing_or_cannot_read_is_named(tmp_path):
    with pytest.raises(ImportError) as missing:
        __import__("math_verify_of_no_release")
    missing.value.name = "math_verify"
    assert "pip install 'jaxft[math]'" in cause_of(missing.value)
    with pytest.raises(ImportError) as other:
        exec("from numpy import no_such_name")
    assert "the installed numpy does not fit" in cause_of(other.value)
    (tmp_path / "x").write_bytes(b"\xff" * 16)
    with pytest.raises(safetensors.SafetensorError) as damaged:
        safetensors.safe_open(tmp_path / "x", "np")
    assert "Look at the files that were given" in cause_of(damaged.value)
    with pytest.raises(pyarrow.ArrowInvalid) as damaged:
        pyarrow.ipc.open_file(pyarrow.py_buffer(b"no arrow"))
    assert "Look at the files that were given" in cause_of(damaged.value)


def test_an_error_of_the_system_that_a_library_in_rust_met_has_its_mend(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    with pytest.raises(Exception, match="os error") as caught:
        tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "absent" / "tokenizer.json"))
    assert type(caught.value) is Exception
    assert REMEDIES[errno.ENOENT] in cause_of(caught.value)


def test_the_error_that_another_was_raised_from_counts():
    try:
        try:
            (Path("/dev/null") / "x").read_text()
        except OSError as error:
            raise RuntimeError("a library hides the reason") from error
    except RuntimeError as error:
        assert "/dev/null/x: Not a directory" in cause_of(error)


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), AssertionError(), ImportError("x", name="jaxft.x")])
def test_an_error_of_the_program_keeps_its_traceback_and_asks_for_a_report(error, capsys):
    try:
        raise error
    except type(error) as caught:
        assert explained("train", caught) == ExitCode.FAILED
    said = capsys.readouterr().err
    assert "Traceback" in said and "Please report it" in said


def test_an_argument_that_is_not_utf8_is_refused_before_anything_is_read(capsys, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/r\xff")
    assert cli.main(["train", "--config=configs/quickstart.py:smoke", f"--output={path}"]) == 2
    assert "has bytes that are not UTF-8" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cannot list ftp://me:pass@host/x", "cannot list ftp://...@host/x"),
        ("https://host/x?X-Amz-Signature=abc123&part=2", "https://host/x?X-Amz-Signature=...&part=2"),
        ("https://host/x?access_token=abc123", "https://host/x?access_token=..."),
        ("Authorization: Bearer abcdefgh12345", "Authorization: Bearer ..."),
        ("the token hf_abcdefgh12345 is wrong", "the token hf_... is wrong"),
        ("hf://owner/name@main, gs://bucket/a:b@c, hf_home", "hf://owner/name@main, gs://bucket/a:b@c, hf_home"),
    ],
)
def test_no_message_shows_a_password_or_a_token(text, shown, capsys):
    assert explained("train", ConfigError(text)) == ExitCode.REFUSED
    assert capsys.readouterr().err == f"jaxft train: {shown}\n"
    try:
        raise TypeError(text)
    except TypeError as error:
        explained("train", error)
    assert shown in capsys.readouterr().err


def test_a_name_of_megabytes_in_a_message_is_searched_for_secrets_in_proportion():
    """A time that grew with its square would be hours. The search cannot be stopped within a process."""
    program = (
        "from jaxft.cli.errors import without_secrets\n"
        "for text in ('a', '?', '?token', 'x://', '://:', '-key'):\n"
        "    for before in ('', '?', '://'):\n"
        "        without_secrets(before + text * (4_000_000 // len(text)))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300, cwd=Path(jaxft.__file__).parents[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("platform", "said"),
    [("cuda", "JAX cannot use the devices of this machine: "), ("nothing", "JAX_PLATFORMS=nothing asks for this")],
)
def test_a_back_end_that_is_absent_is_refused_with_the_mend(platform, said, tmp_path):
    command = [sys.executable, "-m", "jaxft.cli", "train", "--config=configs/quickstart.py:smoke"]
    env = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run(
        [*command, f"--output={tmp_path / 'r'}"], env=env, capture_output=True, text=True, timeout=300,
        cwd=Path(jaxft.__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert said in done.stderr and "JAX_PLATFORMS=cpu" in done.stderr and "Traceback" not in done.stderr


def test_a_limit_that_jax_would_abort_under_is_refused(tmp_path):
    command = [sys.executable, "-m", "jaxft.cli", "generate", "--model", str(tmp_path), "--prompt", "hello"]
    limited = ["sh", "-c", 'ulimit -v 1500000 && exec "$@"', "sh", *command]
    done = subprocess.run(limited, capture_output=True, text=True)
    assert done.returncode == ExitCode.REFUSED
    assert "limited to 1.5 GB (ulimit -v), and JAX needs 3.0 GB" in done.stderr and "ulimit -v unlimited" in done.stderr
