"""Objects below one address in a bucket of Google Cloud Storage, and its refusals in words."""

import base64
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, TypeVar

from jaxft.checkpoint.manifest import OF_BUCKETS, THREADS
from jaxft.errors import CheckpointError
from jaxft.files.buckets.gcs import gcs_file_system
from jaxft.files.deadlines import PIECE, READ_SECONDS, repeated

Result = TypeVar("Result")

# Read by the libraries when they are first used. What is set already stays.
SETTINGS = {
    "EPATH_USE_TF": "0",  # Orbax writes by gcsfs, whether or not TensorFlow is installed
    # A connection over which nothing comes for a minute is given up and made anew.
    "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS": "60",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",
}


class Objects:
    """The objects below `gs://BUCKET/FOLDER`, by their names without that address.

    Raises CheckpointError, which says how to correct it, for whatever goes wrong.
    """

    def __init__(self, address: str) -> None:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        self.address = address
        self._root = address.removeprefix("gs://")
        self.bucket = "gs://" + self._root.partition("/")[0]

    def names(self) -> list[str]:
        """The names of all objects, sorted."""
        return sorted(self._list())

    def digests(self, prefix: str, algorithm: str) -> dict[str, dict[str, Any]]:
        """Name without `prefix` -> bytes and checksum of every object that begins with it, as a manifest has them.

        Sums that the bucket states need no transfer; others are computed from what is read.
        """
        from concurrent.futures import ThreadPoolExecutor

        entries = {name: entry for name, entry in self._list().items() if name.startswith(prefix)}

        def digest(name: str) -> dict[str, Any]:
            stated = entries[name].get("md5Hash") if algorithm == OF_BUCKETS else None
            checksum = base64.b64decode(stated).hex() if stated else self._sum(name, entries[name]["size"], algorithm)
            return {"bytes": int(entries[name]["size"]), "checksum": checksum}

        with ThreadPoolExecutor(THREADS) as pool:
            return dict(zip((n.removeprefix(prefix) for n in entries), pool.map(digest, entries), strict=True))

    def read(self, name: str) -> bytes:
        return self._done(lambda: self._files.cat_file(f"{self._root}/{name}"), f"cannot read {self.address}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """Writes a whole object, which appears at once or not at all."""
        self._done(
            lambda: self._files.pipe_file(f"{self._root}/{name}", content), f"cannot write {self.address}/{name}"
        )

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; those that are not there are passed over."""
        paths = [f"{self._root}/{name}" for name in names]

        def remove() -> None:
            try:
                self._files.rm(paths)
            except FileNotFoundError:  # none of them was there
                return

        if paths:
            self._done(remove, f"cannot delete {self.address}/...")

    def check_access(self, name: str) -> None:
        """Writes and deletes an object by TensorStore, which has its own credentials and connections."""
        import tensorstore

        failure = f"cannot write to {self.address}"
        bucket, _, path = self._root.partition("/")
        spec = {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
        try:
            store = tensorstore.KvStore.open(spec).result(timeout=READ_SECONDS)
            store.write(name, b"x").result(timeout=READ_SECONDS)
            store.write(name, None).result(timeout=READ_SECONDS)
        except Exception as error:  # TensorStore promises no types
            raise CheckpointError(f"{failure}: {refusal(error, self.bucket)}") from error

    @cached_property
    def _files(self) -> Any:
        from fsspec.config import conf

        # Another process of the run may have written what an earlier listing of this one did not have. Orbax's own
        # instance reads this too.
        conf.setdefault("gs", {})["use_listings_cache"] = False
        try:
            files = gcs_file_system()
        except ImportError as error:
            raise CheckpointError(f"cannot write to {self.address}: {error}. Install it: pip install gcsfs") from error
        return self._done(files, f"cannot reach {self.bucket}")

    def _list(self) -> Mapping[str, Mapping[str, Any]]:
        entries = self._done(lambda: self._files.find(self._root, detail=True), f"cannot list {self.address}")
        return {name.removeprefix(f"{self._root}/"): entry for name, entry in entries.items()}

    def _sum(self, name: str, size: int, algorithm: str) -> str:
        checksum = hashlib.new(algorithm, usedforsecurity=False)
        for first in range(0, size, PIECE):
            checksum.update(
                self._done(
                    lambda: self._files.cat_file(f"{self._root}/{name}", start=first, end=min(first + PIECE, size)),  # noqa: B023
                    f"cannot read {self.address}/{name}",
                )
            )
        return checksum.hexdigest()

    def _done(self, action: Callable[[], Result], failure: str) -> Result:
        try:
            return repeated(action)
        except Exception as error:  # gcsfs raises errors of many libraries
            raise CheckpointError(f"{failure}: {refusal(error, self.bucket)}") from error


def refusal(error: BaseException, bucket: str) -> str:
    """Why a bucket did not do what was asked, and how to correct it. error: of gcsfs or TensorStore."""
    text = str(error).strip() or type(error).__name__
    first = re.sub(r":? ?https?://\S+", "", text.partition("\n")[0].partition(" [")[0])[:300] or "not found"
    code = str(getattr(error, "code", ""))
    if code == "401" or any(word in text for word in ("UNAUTHENTICATED", "Unauthorized", "DefaultCredentialsError")):
        return (
            f"{first}\nThere are no valid credentials for {bucket}. On your own machine: gcloud auth "
            "application-default login. On a VM of Google Cloud: give it a service account"
        )
    if "PERMISSION_DENIED" in text or text.startswith("Forbidden") or code == "403":
        return (
            f"{first}\nThe account may not do this in {bucket}. It needs to read, write and delete objects: gcloud "
            f"storage buckets add-iam-policy-binding {bucket} --member=serviceAccount:NAME "
            "--role=roles/storage.objectUser. A VM needs the scope cloud-platform, too"
        )
    if "NOT_FOUND" in text or isinstance(error, FileNotFoundError):
        return (
            f"{first}\nThere is no bucket {bucket}, or no such object in it. Check the name, or make the bucket: "
            f"gcloud storage buckets create {bucket}"
        )
    if "credential" in text.lower():
        return (
            f"{first}\nOn your own machine: gcloud auth application-default login. On a VM of Google Cloud: give it a "
            "service account"
        )
    return f"{first}\nRequests are repeated if the network fails or the bucket is overloaded; this one failed each time"
