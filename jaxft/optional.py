"""Libraries that need not be installed, and whose import needs care."""

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import jax

log = logging.getLogger(__name__)
# tokamax 0.0.12 calls functions that JAX 0.12 lacks; 0.10.2 has them.
TOKAMAX_BEFORE = (0, 11)


def tokamax_module(name: str) -> ModuleType | None:
    """A module of tokamax, a library of kernels for GPUs; None if it is not installed or does not work with this JAX.

    tokamax reads options of its own from the program's command line, by absl, which ends programs that have others. It
    is told that this has been done, so that its options have their defaults; a program that lets absl read its command
    line can still do so.
    """
    if not _works():
        return None
    try:
        module = importlib.import_module(name)
        from absl import flags
    except (ImportError, AttributeError):
        return None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return module


@functools.cache
def _works() -> bool:
    """Whether this JAX has what tokamax calls; a line in the log if not, once."""
    if jax.__version_info__ < TOKAMAX_BEFORE:
        return True
    if importlib.util.find_spec("tokamax") is not None:
        log.warning(
            "tokamax is not used: it does not work with JAX %s. Without it products of experts on GPUs are slower and "
            "packed attention takes more memory: use Python 3.11, whose newest JAX, 0.10.2, it works with.",
            jax.__version__,
        )
    return False
