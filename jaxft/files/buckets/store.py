"""The objects of a folder in a bucket: whole reads and writes, repeated while the store or the network fails.

An object appears whole, or not at all, and nothing is renamed. Every request has a deadline. The requests are those of
Google's JSON API (https://cloud.google.com/storage/docs/json_api), sent by gcsfs, which brings the credentials.
"""

import base64
import hashlib
import json
import logging
import os
import random
import re
import time
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxft.errors import BucketError, ConfigError
from jaxft.files.atomic import unfinished_file
from jaxft.files.buckets.gcs import gcs_file_system
from jaxft.files.deadlines import within

SCHEME = "gs://"
ANSWER_SECONDS = 120.0  # for one request with the repetitions of gcsfs
OUTAGE_SECONDS = 300.0  # after which a request that fails again and again is given up
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds before an attempt is repeated
CHUNK = 2**24  # bytes that are sent or fetched in one request; a multiple of 256 KiB, as the API demands
UPLOADS = 3  # of a file whose upload the store has forgotten
TRANSIENT = {408, 429, 500, 502, 503, 504}

Result = TypeVar("Result")


class Entry(NamedTuple):
    """An object. size: in bytes. md5: in base64, as the bucket states it; empty for an object composed of others."""

    size: int
    md5: str


class Content(NamedTuple):
    """What an object holds. generation: changes with every write."""

    data: bytes
    generation: str


class Changed(Exception):
    """An object has another generation than the one that a write named."""


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address in a bucket of Google Cloud Storage."""
    return os.fspath(path).startswith(SCHEME)


class Bucket:
    """A folder in a bucket. Names of objects are relative to it.

    Raises ConfigError for an address without a bucket or a folder, and if gcsfs is not installed. All methods raise
    BucketError, with what to do, if the bucket refuses, or fails for longer than OUTAGE_SECONDS.
    """

    def __init__(self, address: str) -> None:
        parts = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+)/+(.*?)/*", address)
        if parts is None or not parts[2] or "//" in parts[2] or re.search(r"[\0\r\n#?*\[\]]|(^|/)\.\.?(/|$)", parts[2]):
            raise ConfigError(
                f"{address} names no folder in a bucket: write gs://BUCKET/FOLDER, the bucket in lower case, and the "
                "folder without //, .., and the characters # ? * [ ]"
            )
        self.name, self._folder = parts[1], parts[2]
        self.address = f"{SCHEME}{self.name}/{self._folder}"

    def check(self) -> None:
        """Raises BucketError if the bucket does not exist, or its objects may not be listed."""
        self._request("GET", "b/{}/o", self.name, prefix=f"{self._folder}/", maxResults="1", doing="read")

    def entries(self, below: str = "") -> dict[str, Entry]:
        """The objects whose names begin with `below`, by name."""
        objects: dict[str, Entry] = {}
        page: dict[str, str] = {}
        prefix = f"{self._folder}/"
        while True:
            _, text = self._request("GET", "b/{}/o", self.name, prefix=prefix + below, doing="list", **page)
            answer = json.loads(text)
            for item in answer.get("items", []):
                objects[item["name"].removeprefix(prefix)] = Entry(int(item["size"]), item.get("md5Hash", ""))
            if "nextPageToken" not in answer:
                return objects
            page = {"pageToken": answer["nextPageToken"]}

    def read(self, name: str) -> Content | None:
        """What a small object holds; None if there is none of this name."""
        try:
            headers, data = self._request("GET", "b/{}/o/{}", self.name, self._key(name), alt="media", doing="read")
        except FileNotFoundError:
            return None
        generation = headers.get("X-Goog-Generation") or self._generation(name)
        return Content(data, generation)

    def write(self, name: str, data: bytes, *, generation: str | None = None) -> str:
        """Writes a small object in place of one of the same name. Returns its generation.

        generation: the one that is replaced; "0": none may be there. Raises Changed if that is not so.
        """
        condition = {} if generation is None else {"ifGenerationMatch": generation}
        return str(json.loads(self._write_whole(name, data, **condition))["generation"])

    def upload(self, name: str, path: Path) -> None:
        """Writes an object from a file, in requests of CHUNK bytes. A request that fails is taken up where it stopped.

        What arrived is compared with the file by MD5.
        """
        size = path.stat().st_size
        if size <= CHUNK:
            data = path.read_bytes()
            self._compare(name, self._write_whole(name, data), hashlib.md5(data))
            return
        for _ in range(UPLOADS):
            try:
                self._send(name, path, size)
                return
            except FileNotFoundError:  # the store has forgotten the upload: it had ended, or is begun again
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "md5")
                if self.entries(name).get(name) == Entry(size, _base64(digest)):
                    return
        raise BucketError(f"{self.address}/{name} cannot be uploaded: the store forgot the upload {UPLOADS} times")

    def _send(self, name: str, path: Path, size: int) -> None:
        location, digest, answer = self._begin_upload(name), hashlib.md5(), b""
        with open(path, "rb") as file:
            for offset in range(0, size, CHUNK):
                chunk = file.read(CHUNK)
                digest.update(chunk)
                answer = self._send_chunk(location, chunk, offset, size)
        self._compare(name, answer, digest)

    def download(self, name: str, path: Path, size: int) -> None:
        """Writes an object of `size` bytes into a file, whose folder is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_file(path)  # who reads the file that is there already goes on with it
        with open(unfinished, "wb") as file:
            for start in range(0, size, CHUNK):
                bounds = {"Range": f"bytes={start}-{min(start + CHUNK, size) - 1}"}
                _, data = self._request(
                    "GET", "b/{}/o/{}", self.name, self._key(name), alt="media", headers=bounds, doing="read"
                )
                file.write(data)
        if unfinished.stat().st_size != size:
            raise BucketError(f"{self.address}/{name} was changed while it was read: give the command again")
        os.replace(unfinished, path)

    def delete(self, name: str, *, generation: str | None = None) -> None:
        """Deletes an object, if there is one. generation: as for `write`."""
        condition = {} if generation is None else {"ifGenerationMatch": generation}
        try:
            self._request("DELETE", "b/{}/o/{}", self.name, self._key(name), doing="delete", **condition)
        except FileNotFoundError:
            return

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _generation(self, name: str) -> str:
        _, text = self._request("GET", "b/{}/o/{}", self.name, self._key(name), doing="read")
        return str(json.loads(text)["generation"])

    def _write_whole(self, name: str, data: bytes, **values: str) -> bytes:
        """Writes an object in one request, whose parts are its name and its bytes. Returns the answer."""
        boundary = uuid.uuid4().hex
        kinds = ("application/json; charset=UTF-8", "application/octet-stream")
        parts = zip(kinds, (json.dumps({"name": self._key(name)}).encode(), data), strict=True)
        body = b"".join(
            f"--{boundary}\r\nContent-Type: {kind}\r\n\r\n".encode() + part + b"\r\n" for kind, part in parts
        )
        headers = {"Content-Type": f"multipart/related; boundary={boundary}"}
        data = body + f"--{boundary}--".encode()
        return self._request(
            "POST",
            self._uploads,
            uploadType="multipart",
            name=self._key(name),
            headers=headers,
            data=data,
            doing="write",
            **values,
        )[1]

    def _begin_upload(self, name: str) -> str:
        """The address to which the bytes of a new object are sent."""
        named = {"name": self._key(name)}
        headers, _ = self._request("POST", self._uploads, uploadType="resumable", json=named, doing="write", **named)
        return str(headers["Location"])

    @property
    def _uploads(self) -> str:
        return f"{self._files._location}/upload/storage/v1/b/{self.name}/o"

    def _send_chunk(self, location: str, chunk: bytes, offset: int, size: int) -> bytes:
        """Sends bytes of a resumable upload, and those alone that have not arrived. Returns the last answer."""
        begin, end = offset, offset + len(chunk)
        while True:
            bounds = {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}
            try:
                headers, text = self._request(
                    "PUT", location, headers=bounds, data=chunk[begin - offset :], doing="write"
                )
            except BucketError:  # the chunk, or its first part, had arrived, and the answer to it had not
                headers, text = self._request(
                    "PUT", location, headers={"Content-Range": f"bytes */{size}"}, doing="write"
                )
                if not text and _arrived(headers) <= begin:
                    raise
            begin = size if text else _arrived(headers)
            if begin >= end:
                return text

    def _compare(self, name: str, answer: bytes, digest: Any) -> None:
        stated = json.loads(answer).get("md5Hash")
        if stated is not None and stated != _base64(digest):
            self.delete(name)
            raise BucketError(
                f"{self.address}/{name} arrived with other bytes than were sent, and was deleted: give the command "
                "again; if it happens again, the network or the memory of this machine is damaged"
            )

    def _request(self, *arguments: str, doing: str, **values: Any) -> tuple[Any, bytes]:
        return tried(lambda: self._files.call(*arguments, **values), f"{doing} {self.address}", self.name)

    @cached_property
    def _files(self) -> Any:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # its errors are raised, and told in words
        try:
            files = gcs_file_system()
        except ImportError as error:
            raise ConfigError(f'{self.address} needs gcsfs ({error}): pip install "jaxft[gcs]"') from error
        return tried(files, f"reach {self.address}", self.name)


def _base64(digest: Any) -> str:
    return base64.b64encode(digest.digest()).decode()


def _arrived(headers: Any) -> int:
    """How many bytes of a resumable upload the bucket has."""
    bounds = headers.get("Range", "")
    return int(bounds.rpartition("-")[2]) + 1 if bounds else 0


def tried(action: Callable[[], Result], what: str, bucket: str) -> Result:
    """What an action on a store returns, which is repeated with growing pauses while the store or the network fails.

    what: it does, for messages. Raises FileNotFoundError for an object or upload that is not there, Changed for a
    condition that is not met, and BucketError for everything else.
    """
    until, pause = time.monotonic() + OUTAGE_SECONDS, FIRST_PAUSE
    while True:
        try:
            return within(action, ANSWER_SECONDS)
        except FileExistsError as error:  # as gcsfs names status 412
            raise Changed from error
        except FileNotFoundError as error:
            if "/o/" in str(error) or "upload_id=" in str(error):
                raise
            raise BucketError(_refusal(what, bucket, 404, "")) from error
        except BucketError:
            raise
        except Exception as error:
            if not _is_transient(error):
                raise BucketError(_refusal(what, bucket, _status(error), _reason(error))) from error
            if time.monotonic() > until:
                raise BucketError(
                    f"cannot {what}: for {OUTAGE_SECONDS:.0f} s the store or the network failed again and again "
                    f"({_reason(error)}). Give the same command again when it works."
                ) from error
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, LONGEST_PAUSE)


def _is_transient(error: Exception) -> bool:
    import aiohttp
    import requests

    if isinstance(error, TimeoutError | ConnectionError | aiohttp.ClientError | requests.exceptions.RequestException):
        return True
    return _status(error) in TRANSIENT


def _status(error: Exception) -> int:
    if str(error).startswith("Forbidden:"):  # as gcsfs names status 403
        return 403
    code = getattr(error, "code", None)
    return int(code) if isinstance(code, int | str) and str(code).isdecimal() else 0


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _refusal(what: str, bucket: str, status: int, reason: str) -> str:
    mends = {
        401: "no valid credentials were found. Run `gcloud auth application-default login`, or set "
        "GOOGLE_APPLICATION_CREDENTIALS to the key file of a service account",
        403: "the account may not do this. Give it the role roles/storage.objectUser on the bucket; a host of a TPU "
        "needs the scope cloud-platform as well",
        404: f"there is no bucket {bucket}. Correct the name, or make the bucket: `gcloud storage buckets create "
        f"gs://{bucket} --location=REGION`",
    }
    mend = mends.get(status, "the store refused it. Correct what it says, or choose another output_dir")
    return f"cannot {what}: {mend}." + (f" (The store says: {reason})" if reason else "")
