"""The process of an engine: started with one end of a socket pair, and ended with it."""

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxft.serving.engines.spec import LINE_BYTES

LOG_BYTES = 2**20  # of a log to which another start is added
END_SECONDS = 5.0  # from the end of the connection to SIGKILL


@dataclass
class EngineProcess:
    """A process that lives. reader, writer: its socket."""

    process: "subprocess.Popen[bytes]"
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def end(self) -> int:
        """Closes the connection, waits for the end of the process, or kills it, and returns its exit code."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()
        return await asyncio.shield(asyncio.to_thread(_wait, self.process))


def _wait(process: "subprocess.Popen[bytes]") -> int:
    try:
        return process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


async def start(command: Sequence[str], log: Path) -> EngineProcess:
    """Starts an engine, which is told the number of its socket by `--socket=N`. log: what it prints goes there."""
    ours, theirs = socket.socketpair()
    try:
        process = await asyncio.to_thread(_spawn, [*command, f"--socket={theirs.fileno()}"], theirs, log)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    ours.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
    return EngineProcess(process, reader, writer)


def _spawn(command: Sequence[str], theirs: socket.socket, log: Path) -> "subprocess.Popen[bytes]":
    mode = "ab" if log.is_file() and log.stat().st_size < LOG_BYTES else "wb"
    with open(log, mode) as file:
        os.fchmod(file.fileno(), 0o600)
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # signals of the terminal are the server's to answer
        )
