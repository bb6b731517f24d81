"""What a user, a disk, a network or a machine did to end a command, in words; None for an error of the program itself.

Never explained, and so shown with their traceback: AssertionError, AttributeError, IndexError, KeyError, NameError,
NotImplementedError, RecursionError, TypeError, ValueError (but for subclasses of ours), and any other class that is not
named here.
"""

import errno
import os
import re
import sys
from collections.abc import Iterator

from jaxft.errors import JaxftError
from jaxft.system import REMEDIES, described

NETWORK = (
    "Check the address, the network and any proxy; then give the same command again. Without a network, everything "
    "must be on this machine already."
)
NETWORK_ERRNOS = frozenset(
    (errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH,
     errno.ENETDOWN, errno.EHOSTDOWN)
)  # fmt: skip
NETWORK_LIBRARIES = ("httpx", "httpcore", "aiohttp", "requests", "urllib3", "gcsfs", "botocore", "google", "fsspec")
FILE_LIBRARIES = ("pyarrow", "safetensors", "safetensors_rust", "tokenizers")
# Of a module that is missing, what pip installs: the project's extras, or the package of another name.
EXTRAS = {
    "libgguf": "jaxft[k-quants]", "math_verify": "jaxft[math]", "wandb": "jaxft[wandb]", "mlflow": "jaxft[mlflow]",
    "trackio": "jaxft[trackio]", "datasets": "jaxft[datasets]", "tensorflow_datasets": "jaxft[tfds]",
    "array_record": "jaxft[tfds]", "importlib_resources": "jaxft[tfds]", "libtpu": "jaxft[plan]", "yaml": "pyyaml",
    "google.protobuf": "protobuf", "starlette": "jaxft[serve]", "uvicorn": "jaxft[serve]",
    "python_multipart": "jaxft[serve]",
}  # fmt: skip
SMALLER = (
    "Lower train.batch_size or data.max_length; keep the batch and raise train.accumulation_steps; let the backward "
    "pass recompute more (model.remat=full, or auto); quantise the base (model.quantization=nf4-dq); or split the "
    "model over more devices (mesh.fsdp). `jaxft plan` says before a run how much a step needs."
)
SMALLER_ANSWERS = (
    "Load the model in fewer bits (--dtype=bfloat16, --quantization=nf4-dq), or ask for fewer and shorter answers."
)
LIMITED = (
    "If `ulimit -v`, a container or a job's request sets the limit, raise it; else end other programs, or load the "
    "model in fewer bits."
)
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust writes an error of the operating system
LIBRARY = "a library that jaxft uses could not read or write a file"


def cause_of(error: BaseException, verb: str = "train") -> str | None:
    """The cause of an error that jaxft did not make, and how to mend it; None for an error of the program.

    verb: the command, whose settings the mend names. Errors from which another was raised are asked too.
    """
    for one in _chain(error):
        for explain in (_of_ours, _of_backend, _of_memory, _of_system, _of_missing_package, _of_library):
            text = explain(one, verb)
            if text is not None:
                return text
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, those within its group, and those that it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        if isinstance(seen, BaseExceptionGroup):
            for inner in seen.exceptions:
                yield from _chain(inner)
        seen = seen.__cause__


def _of_ours(error: BaseException, verb: str) -> str | None:
    return str(error) if isinstance(error, JaxftError) else None


def _of_backend(error: BaseException, verb: str) -> str | None:
    """JAX finds its devices once, in one module, which raises errors of several classes and some without a word."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not trace.tb_frame.f_code.co_filename.endswith(os.path.join("jax", "_src", "xla_bridge.py")):
        return None
    platforms, message = os.environ.get("JAX_PLATFORMS", ""), str(error)
    if "lockfile" in message or "already in use" in message:
        mend = (
            "Another process has the TPU: end it (`sudo lsof -w /dev/accel0 /dev/vfio/*` shows it), and remove "
            "/tmp/libtpu_lockfile if no process is left."
        )
    elif platforms:
        mend = (
            f"JAX_PLATFORMS={platforms} asks for this back end: unset it, or set JAX_PLATFORMS=cpu, to run without; "
            "for a GPU pip install 'jaxft[cuda]', for a TPU 'jaxft[tpu]', and see that the driver is there."
        )
    else:
        mend = "JAX_PLATFORMS=cpu runs without an accelerator."
    return f"JAX cannot use the devices of this machine: {message or f'it has no back end {platforms}'}. {mend}"


def _of_memory(error: BaseException, verb: str) -> str | None:
    smaller = SMALLER_ANSWERS if verb in ("generate", "chat", "score", "sample", "eval") else SMALLER
    if isinstance(error, MemoryError):
        what = f": {error}" if str(error) else ""
        return f"this process can have no more memory{what}. {LIMITED} {smaller if verb == 'train' else ''}".rstrip()
    names = {kind.__name__ for kind in type(error).__mro__}
    if not names & {"JaxRuntimeError", "XlaRuntimeError"} or "RESOURCE_EXHAUSTED" not in str(error):
        return None
    first = str(error).strip().splitlines()[0]
    if "jax" in sys.modules and sys.modules["jax"].default_backend() == "cpu":
        return f"this process can have no more memory ({first}). {LIMITED} {smaller}"
    return f"the memory of the accelerator does not suffice ({first}). {smaller}"


def _of_system(error: BaseException, verb: str) -> str | None:
    if isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        return f"no thread can be started: {LIMITED} `ulimit -u` limits threads too."
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        text = ascii(error.object[max(0, error.start - 60) : error.end + 20])
        return f"a name or a text has bytes that are not UTF-8: {text}. Rename it, or write it in UTF-8."
    if not isinstance(error, OSError):
        return None
    if isinstance(error, TimeoutError | ConnectionError) or error.errno in NETWORK_ERRNOS or _is_address(error):
        return described(error, REMEDIES[errno.EPIPE] if error.errno == errno.EPIPE else NETWORK)
    return described(error)


def _is_address(error: OSError) -> bool:
    """Whether a name of a host could not be resolved: its numbers are not those of `errno`."""
    return type(error).__module__ == "socket" or type(error).__name__ == "gaierror"


def _of_missing_package(error: BaseException, verb: str) -> str | None:
    name = getattr(error, "name", None)
    if not isinstance(error, ImportError) or not name or name.partition(".")[0] == "jaxft":
        return None
    top = name.partition(".")[0]
    package = EXTRAS.get(name) or EXTRAS.get(top) or top
    if isinstance(error, ModuleNotFoundError):
        return f"the package {top} is needed here and not installed: pip install '{package}'"
    return (
        f"the installed {top} does not fit: {error}. Install the releases that jaxft was tested with "
        f"(constraints/ in its repository), or a newer one: pip install -U '{package}'"
    )


def _of_library(error: BaseException, verb: str) -> str | None:
    """Errors of libraries that read files or speak with servers; Rust's panics are not even of class Exception."""
    root = type(error).__module__.partition(".")[0]
    number = OS_ERROR.search(str(error))
    if number is not None and (type(error) is Exception or root in FILE_LIBRARIES):
        return f"{LIBRARY}: {error}. {REMEDIES.get(int(number[1]), '')}".rstrip()
    if type(error).__name__ == "PanicException":
        return f"{LIBRARY}, and stopped: {error}. Look at the tokenizer, the rows and the weights that were given."
    if root in FILE_LIBRARIES:
        return f"{LIBRARY}: {error}. Look at the files that were given."
    if root in NETWORK_LIBRARIES:
        return f"{type(error).__name__}: {error}. {NETWORK}"
    return None
