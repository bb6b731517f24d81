"""Programs that tests start hear signals that the suite's own process may have been told to ignore."""

import sys

# A shell that puts the suite in the background lets it ignore Ctrl-C, nohup a closed terminal; programs inherit both.
# Before the words of a command: it replaces itself by the command, which has its process number. Python ignores the
# last two signals by itself.
HEARING = [
    sys.executable, "-c",
    "import os, signal, sys\n"
    "for name in ('SIGINT', 'SIGHUP', 'SIGPIPE', 'SIGXFSZ'):\n"
    "    signal.signal(getattr(signal, name), signal.SIG_DFL)\n"
    "os.execvp(sys.argv[1], sys.argv[1:])",
]  # fmt: skip
