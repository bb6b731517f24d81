"""Libraries that need not be installed, and whose import needs care."""

import importlib
from types import ModuleType


def tokamax_module(name: str) -> ModuleType | None:
    """The module of tokamax, a library of kernels for GPUs; None if it is not installed or does not load with this JAX.

    tokamax reads options of its own from the program's command line, by absl, which ends programs that have others. It
    is told that this has been done, so that its options have their defaults; a program that lets absl read its command
    line can still do so.
    """
    try:
        module = importlib.import_module(name)
        from absl import flags
    except (ImportError, AttributeError):
        return None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return module
