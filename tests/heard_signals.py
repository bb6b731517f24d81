"""Programs that tests start hear signals that the suite's own process may have been told to ignore."""

import sys

# A shell that puts the suite in the background lets it ignore Ctrl-C, nohup a closed terminal; programs inherit both.
# Before the words of a command: it replaces itself by the command, which has its process number.
HEARING = [
    sys.executable, "-c",
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); os.execvp(sys.argv[1], sys.argv[1:])",
]  # fmt: skip
