"""Limits of the shell that would end a command without a sentence."""

import resource

from jaxft.errors import JaxftError

ADDRESS_SPACE = 3_000_000_000  # bytes; below it XLA aborts the process while it starts its threads
WITHOUT_JAX = frozenset({"data", "runs", "serve", "verify", "pod list"})


def check_address_space(verb: str) -> None:
    """Raises JaxftError if the process may have too little address space for JAX, which cannot report that itself."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if verb in WITHOUT_JAX or limit == resource.RLIM_INFINITY or limit >= ADDRESS_SPACE:
        return
    raise JaxftError(
        f"the address space of this process is limited to {limit / 1e9:.1f} GB (ulimit -v), and JAX needs "
        f"{ADDRESS_SPACE / 1e9:.1f} GB for a start, whatever the model. Run `ulimit -v unlimited` first. "
        "To limit memory, limit what is used, for example by `systemd-run --scope -p MemoryMax=4G`."
    )
