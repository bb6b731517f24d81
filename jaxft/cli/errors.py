"""How a command ends that an error stopped: what it says, and its exit code."""

import re
import select
import sys
import traceback

from jaxft.cli.causes import cause_of
from jaxft.errors import ExitCode, NotMetError, PeerLostError, Preempted
from jaxft.terminal import text as terminal
from jaxft.terminal.output import give_up, settle

# Each takes a time in proportion to the text, whatever is in it: names in files of others may have megabytes.
SECRETS = (
    (re.compile(r"(://)[^/\s@:]*+:[^/\s@]*@"), r"\1...@"),  # user:password@ of an address
    (
        re.compile(r"([?&](?=[\w-]*(?:token|key|secret|sig|password))[\w-]*+=)[^&\s'\"]+", re.IGNORECASE),
        r"\1...",
    ),
    (re.compile(r"\b(hf_|Bearer\s+)[A-Za-z0-9._-]{8,}"), r"\1..."),
)
REPORT = "This is an error of jaxft or of a library. Please report it, with the lines above and `jaxft --version`."


def explained(verb: str, error: BaseException, *, debug: bool = False) -> ExitCode:
    """Says what stopped a command, and returns its exit code.

    debug: show the traceback also of what a user, a disk, a network or a machine caused.
    """
    if isinstance(error, BrokenPipeError) and _output_is_closed():
        return ExitCode.DONE
    if isinstance(error, Preempted | KeyboardInterrupt):
        text = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        code = ExitCode.PREEMPTED if isinstance(error, Preempted) else ExitCode.INTERRUPTED
    else:
        cause = cause_of(error, verb)
        text = REPORT if cause is None else " ".join([cause, *getattr(error, "__notes__", ())])
        code = ExitCode.FAILED if cause is None else ExitCode.REFUSED
        if isinstance(error, PeerLostError | NotMetError):
            code = ExitCode.PEER_LOST if isinstance(error, PeerLostError) else ExitCode.NOT_MET
    if debug or code == ExitCode.FAILED:
        print(terminal.safe_text(without_secrets("".join(traceback.format_exception(error)))), end="", file=sys.stderr)
    terminal.write(without_secrets(f"jaxft {verb}: {text}"), error=True)
    for stream in (sys.stdout, sys.stderr):
        settle(stream)
    return code


def without_secrets(text: str) -> str:
    """A message without the passwords and tokens that addresses, headers and answers of servers may hold."""
    for pattern, shown in SECRETS:
        text = pattern.sub(shown, text)
    return text


def _output_is_closed() -> bool:
    """Whether the reader of standard output, such as `head`, has read enough, so that nothing of it is missed."""
    try:
        number = sys.stdout.fileno()
    except (AttributeError, OSError, ValueError):  # no stream, or one of no file
        return False
    poll = select.poll()
    poll.register(number, 0)
    if not any(events & select.POLLERR for _, events in poll.poll(0)):
        return False
    give_up(sys.stdout)
    return True
