"""The most memory that accelerators have in use while something runs, as they say it themselves."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

EVERY = 0.005  # seconds between two looks
IN_USE, PEAK = "bytes_in_use", "peak_bytes_in_use"


class Device(Protocol):
    """A device of JAX."""

    def memory_stats(self) -> Mapping[str, int] | None:
        """Bytes by name; None where a device does not say, as a CPU."""


def peak_bytes(call: Callable[[], object], devices: Sequence[Device]) -> int | None:
    """The most bytes in use while `call` runs, of all devices together; None if one of them does not say.

    A device keeps the peak of its whole process. If the call raises it, that is the figure; if something before was
    larger, the figure is the most that was seen at looks every few milliseconds.
    """
    before = [device.memory_stats() for device in devices]
    if not devices or any(not stats for stats in before):
        return None
    seen = [0] * len(devices)
    ended = threading.Event()

    def look() -> list[Mapping[str, int]]:
        stats = [device.memory_stats() or {} for device in devices]
        seen[:] = [max(most, one.get(IN_USE, 0)) for most, one in zip(seen, stats, strict=True)]
        return stats

    def watch() -> None:
        while not ended.wait(EVERY):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        call()
    finally:
        ended.set()
        thread.join()
    peaks = [((old or {}).get(PEAK, 0), new.get(PEAK, 0)) for old, new in zip(before, look(), strict=True)]
    return sum(new if new > old else most for (old, new), most in zip(peaks, seen, strict=True))
