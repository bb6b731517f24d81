"""One writer of a folder in a bucket at a time: an object that its owner renews, since a bucket has no locks.

Each write of the object names the generation that it replaces, so of two processes that take a lease at once one gets
it. After any death of the owner the lease expires, and the next process takes it over.
"""

import logging
import os
import threading
import time
from dataclasses import replace

from jaxft.errors import BucketError, FolderInUseError
from jaxft.files.buckets.store import Bucket, Changed
from jaxft.files.locks import lock
from jaxft.files.locks.owner import Owner, is_alive, owner_of, shares_numbers
from jaxft.files.run_folder import LOCK

log = logging.getLogger(__name__)


class Lease:
    """A lease of this process, renewed until `release`. what: its work, for the message that others get.

    Raises FolderInUseError, naming the owner, if another process writes in the folder; BucketError.
    """

    def __init__(self, bucket: Bucket, what: str) -> None:
        self._bucket, self.owner = bucket, Owner(what=what)
        self._lost: str | None = None
        self._ended, self._mutex = threading.Event(), threading.Lock()
        self._generation = self._take()
        threading.Thread(target=self._renew, name="lease of a bucket", daemon=True).start()

    def check(self) -> None:
        """Raises FolderInUseError if another process has taken the lease of this one, which had expired."""
        if self._lost is not None:
            raise FolderInUseError(
                f"the lease of this process on {self._bucket.address} has expired, because it was stopped or cut off "
                f"for more than {lock.LEASE_SECONDS:.0f} s, and belongs to {self._lost} now. Nothing more is written "
                "there. What was saved before is whole: give the same command again once the other has ended."
            )

    def release(self) -> None:
        """Ends the lease. A bucket that fails meanwhile lets it expire."""
        self._ended.set()
        with self._mutex:
            try:
                if self._lost is None:
                    self._bucket.delete(LOCK, generation=self._generation)
            except (BucketError, Changed) as error:
                log.warning("the lease on %s expires by itself: %s", self._bucket.address, error or "it was taken over")

    def _take(self) -> str:
        while True:
            try:
                return self._write("0")
            except Changed:
                there = self._bucket.read(LOCK)
            if there is None:  # it has ended meanwhile
                continue
            before = owner_of(there.data.decode("utf-8", "replace"))
            if before is not None and before.id == self.owner.id:  # the answer to our own write was lost
                return there.generation
            if before is not None:
                self._wait_for_end(before, there.generation)
            try:
                return self._write(there.generation)
            except Changed:
                continue

    def _wait_for_end(self, before: Owner, generation: str) -> None:
        """Returns once the lease of another owner has ended. Raises FolderInUseError as soon as it is renewed."""
        address = self._bucket.address
        if shares_numbers(before):
            if not is_alive(before):
                return
            # A process of its number may be another one, such as this one in a container that was started again: then
            # only renewal tells.
            if before.pid != os.getpid() and abs(time.time() - before.renewed) < lock.LEASE_SECONDS:
                raise FolderInUseError(_refusal(address, before))
        if abs(time.time() - before.renewed) > lock.SKEW_SECONDS:
            return
        log.warning(
            "%s names %s. It is waited for up to %.0f s, whether it lives",
            address,
            before.describe(),
            lock.LEASE_SECONDS,
        )
        until = time.monotonic() + lock.LEASE_SECONDS
        while time.monotonic() < until:
            time.sleep(lock.LEASE_SECONDS / 30)
            now = self._bucket.read(LOCK)
            if now is None:
                return
            if now.generation != generation:
                raise FolderInUseError(_refusal(address, owner_of(now.data.decode("utf-8", "replace")) or before))
        log.warning("taken over from %s, which has not renewed its lease", before.describe())

    def _write(self, generation: str) -> str:
        return self._bucket.write(LOCK, self.owner.to_text().encode(), generation=generation)

    def _renew(self) -> None:
        while not self._ended.wait(lock.RENEW_SECONDS):
            with self._mutex:
                if self._ended.is_set():
                    return
                self.owner = replace(self.owner, renewed=time.time())
                try:
                    self._generation = self._write(self._generation)
                except BucketError as error:  # a bucket that is away for a time; `check` tells the rest
                    log.warning("%s", error)
                except Changed:
                    if not self._is_ours():
                        return

    def _is_ours(self) -> bool:
        """Whether the object is still of this lease, whose renewal was answered by nobody."""
        try:
            there = self._bucket.read(LOCK)
        except BucketError:
            return True
        other = None if there is None else owner_of(there.data.decode("utf-8", "replace"))
        if there is not None and other is not None and other.id == self.owner.id:
            self._generation = there.generation
            return True
        self._lost = "nobody" if other is None else other.describe()
        return False


def owner_now(bucket: Bucket) -> Owner | None:
    """The process that writes in a folder at this moment, by its lease; None if nobody does."""
    there = bucket.read(LOCK)
    owner = None if there is None else owner_of(there.data.decode("utf-8", "replace"))
    if owner is None or (shares_numbers(owner) and not is_alive(owner)):
        return None
    return owner if abs(time.time() - owner.renewed) < lock.LEASE_SECONDS else None


def _refusal(address: str, owner: Owner) -> str:
    return (
        f"{address} is being written by {owner.describe()}. Two writers would damage each other's files, so nothing "
        "was written. Wait until it ends, or stop it, and give the same command again; or give another folder."
    )
