"""Where a run writes, how much room is there, and whether Hugging Face knows this user."""

import os
import shutil
import tempfile
import uuid
from pathlib import Path

from jaxft.doctor.part import Part
from jaxft.errors import JaxftError
from jaxft.files.paths import of_store, url_parts
from jaxft.home import local_path
from jaxft.system import described

LEAST_BYTES = 2 * 10**9  # free on a disk: less is used up by one checkpoint of a small run
PROBE = os.urandom(2**20)


def examine_output(folder: str) -> list[Part]:
    """Whether a folder of this machine or of a bucket takes a file and gives it back, and the room on its disk."""
    folder = local_path(folder)
    if "://" in folder:
        return [_bucket(folder.rstrip("/"))]
    parent = _nearest(Path(folder))
    return [_local(folder, parent), examine_disk(parent)]


def examine_disk(folder: Path) -> Part:
    """The room on the disk of a folder."""
    usage = shutil.disk_usage(folder)
    mend = None
    if usage.total and usage.free < LEAST_BYTES:  # file systems of the kernel have no size
        mend = f"Make room: a run needs at least {LEAST_BYTES / 1e9:.0f} GB. On a TPU host, create a larger boot disk."
    text = f"{usage.free / 1e9:,.1f} of {usage.total / 1e9:,.1f} GB free at {folder}"
    return Part(name="disk", text=text, value={"free_bytes": usage.free, "total_bytes": usage.total}, mend=mend)


def examine_token() -> Part:
    """Whether a token of Hugging Face is there. The token itself is shown nowhere."""
    from huggingface_hub import get_token

    present = get_token() is not None
    text = "a token is there" if present else "no token: models that need an agreement cannot be read"
    return Part(name="hugging face", text=text, value={"token": present})


def _nearest(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next((one for one in (folder, *folder.parents) if one.is_dir()), Path("/"))


def _local(folder: str, parent: Path) -> Part:
    try:
        with tempfile.NamedTemporaryFile(dir=parent, prefix=".jaxft-doctor-") as file:
            file.write(PROBE)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            same = file.read() == PROBE
    except OSError as error:
        return Part(name="output_dir", text=f"{folder} cannot be written", value=folder, mend=described(error))
    if not same:
        mend = "The disk is damaged or full of errors: choose another one."
        return Part(name="output_dir", text=f"{parent} returned other bytes than were written", value=folder, mend=mend)
    where = "" if parent == Path(folder).absolute() else f", which will be created below {parent}"
    return Part(name="output_dir", text=f"{folder}{where}: a file was written and read back", value=folder)


def _bucket(folder: str) -> Part:
    try:
        files, root = url_parts(folder)
        path = f"{root.rstrip('/')}/.jaxft-doctor-{uuid.uuid4().hex}"

        def write_and_read() -> bool:
            files.pipe_file(path, PROBE)
            try:
                return bool(files.cat_file(path) == PROBE)
            finally:
                files.rm_file(path)

        same = of_store(write_and_read, f"cannot write to {folder}")
    except JaxftError as error:
        mend = (
            f"{error}. The account of this machine needs storage.objects.create, get and delete on the bucket, and on "
            "a TPU host the scope cloud-platform."
        )
        return Part(name="output_dir", text=f"{folder} cannot be written", value=folder, mend=mend)
    if not same:
        mend = "Another program writes there, or the store is damaged: choose another folder."
        return Part(name="output_dir", text=f"{folder} returned other bytes than were written", value=folder, mend=mend)
    return Part(name="output_dir", text=f"{folder}: an object was written, read back and deleted", value=folder)
