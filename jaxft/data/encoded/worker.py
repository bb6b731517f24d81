"""A process that encodes parts of a set for another one.

    python worker.py FILE_DESCRIPTOR [FOLDER ...]

It is run as a script, so that the program that started the run is not imported again. The folders are those from which
modules are imported. It receives the work, pickled, and then (start, stop, path, rows or None) of one part after
another: it writes the examples of these rows to an Arrow file and answers `ok` with the counts, `data` with the message
of a DataError, `disk` with that of a NotKept, or `error` with the end of a traceback.
"""

import ctypes
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection

PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
LINES = 12  # of a traceback


def main() -> None:
    """Serves the connection until it is closed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    connection = Connection(int(sys.argv[1]))
    sys.path[:] = sys.argv[2:]

    from jaxft.data.encoded.work import NotKept, write_arrow
    from jaxft.errors import DataError

    try:
        pickled = connection.recv_bytes()
        work = None
        while True:
            start, stop, path, listed = connection.recv()
            try:
                work = work or pickle.loads(pickled)
                batch, counts = work.encode(start, stop, listed)
                write_arrow(batch, path)
                connection.send(("ok", counts.to_dict()))
            except DataError as error:
                connection.send(("data", str(error)))
            except NotKept as error:
                connection.send(("disk", str(error)))
            except Exception:
                connection.send(("error", "".join(traceback.format_exc().splitlines(keepends=True)[-LINES:])))
    except EOFError:
        return


if __name__ == "__main__":
    main()
