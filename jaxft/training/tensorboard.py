"""The metrics of a run as TensorBoard event files, if tensorboardX is installed."""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path


class TensorBoard:
    """Event files of a folder, written at once. An error is told once and ends the files, not the run.

    folder: made if absent. first_step: the first step that will be written. say: told what is missing.

    tensorboardX's SummaryWriter hands events to a thread, and its flush does not wait for them: a kill would
    leave a hole before the step from which the run resumes. So its event writer is used directly.
    """

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], None]) -> None:
        self._say, self._events = say, None
        try:
            self._events = _Events(folder, first_step)
        except ImportError:
            say("no TensorBoard files: tensorboardX is not installed (pip install tensorboardX)")
        except Exception as error:  # whatever its library raises
            self._end(error)

    def write(self, row: Mapping[str, float]) -> None:
        """Records a row of metrics.jsonl."""
        if self._events is None:
            return
        try:
            self._events.write(row)
        except Exception as error:
            self._end(error)

    def close(self) -> None:
        """Closes the file; harmless when called again."""
        events, self._events = self._events, None
        if events is None:
            return
        try:
            events.close()
        except Exception as error:
            self._end(error)

    def _end(self, error: Exception) -> None:
        self._say(
            f"warning: TensorBoard files cannot be written ({type(error).__name__}: {error}). The run goes on without "
            "them; metrics.jsonl has the same figures"
        )
        events, self._events = self._events, None
        if events is not None:
            with contextlib.suppress(Exception):  # the error that is told made it useless already
                events.close()


class _Events:
    """One event file."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._Event, self._Summary = Event, Summary
        folder.mkdir(exist_ok=True)
        # The suffix keeps a run restarted within the same second from overwriting its own file.
        self._writer = EventsWriter(str(folder / "events"), f".from{first_step}")
        # A session start makes readers forget what an earlier file holds from first_step on.
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, row: Mapping[str, float]) -> None:
        values = [self._Summary.Value(tag=k, simple_value=v) for k, v in row.items() if k != "step"]
        event = self._Event(wall_time=time.time(), step=row["step"], summary=self._Summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
