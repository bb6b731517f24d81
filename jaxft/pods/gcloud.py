"""Calls of gcloud: its answers as JSON, and its errors sorted by what can be done about them."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxft.errors import PodError
from jaxft.pods.command import TIMED_OUT, Done, Run
from jaxft.terminal.text import safe_message

SECONDS = 120.0  # for a question to an API
CREATE_SECONDS = 1800.0  # for a request that the API answers when the machines are there
ABSENCE = re.compile(r"\bnot[ _]found\b|\bcould not fetch resource\b.*\bnotFound\b", re.IGNORECASE)
EXISTS = re.compile(r"\balready[ _]exists\b", re.IGNORECASE)
# Words of a refusal that another zone, or a later hour, may not give. Compute Engine refuses for quota with 403 too, so
# that quota is looked for before permissions, which may name a quota project in turn.
QUOTA = re.compile(
    r"QUOTA_?EXCEEDED|quota[^.]{0,120}exceeded|exceeded[^.]{0,120}quota|\b429\b|rate limit", re.IGNORECASE
)
ELSEWHERE = (
    (
        "capacity",
        re.compile(
            r"RESOURCE_POOL_EXHAUSTED|RESOURCE_EXHAUSTED|STOCKOUT|no more capacity|not enough (?:resources|capacity)|"
            r"does not have enough resources|resources? (?:is |are )?(?:currently )?(?:exhausted|unavailable)|"
            r"\bcode['\"]?:? 8\b|UNSUPPORTED_OPERATION.*zone|INSUFFICIENT_CAPACITY",
            re.IGNORECASE,
        ),
    ),
    ("reservation", re.compile(r"reservation", re.IGNORECASE)),
)
MENDS = (
    (
        re.compile(
            r"PERMISSION_DENIED|HTTPError 403|does not have permission|Required '[\w.]+' permission", re.IGNORECASE
        ),
        "The account may not do this: have the project's owner give it the role that the message names, and switch "
        "the API on if the message says that it is off",
    ),
    (
        re.compile(r"gcloud auth login|active account|Reauthentication|invalid_grant|UNAUTHENTICATED", re.IGNORECASE),
        "Run `gcloud auth login` first",
    ),
    (
        re.compile(r"unrecognized arguments|Invalid choice|unrecognized command", re.IGNORECASE),
        "This gcloud is too old for the option: run `gcloud components update`",
    ),
    (
        re.compile(r"required property \[project\]|project.*must be specified|The project property", re.IGNORECASE),
        "Name the project: --project=PROJECT, or `gcloud config set project PROJECT`",
    ),
)


class CapacityError(PodError):
    """No capacity, no quota or no reservation here now. Another zone or a later hour may have it."""


@dataclass(frozen=True)
class Gcloud:
    """gcloud for one project. run: what runs a command. project: None for gcloud's own. pool: the zone, the API and
    whose quota counts, in words for errors.
    """

    run: Run
    project: str | None
    pool: str

    def argv(self, words: Sequence[str], flags: Sequence[str] = ()) -> list[str]:
        """The whole command. It never asks a question."""
        project = [] if self.project is None else [f"--project={self.project}"]
        return ["gcloud", *words, *project, *flags, "--quiet"]

    def call(self, words: Sequence[str], flags: Sequence[str] = (), *, seconds: float = SECONDS) -> str:
        """The output of a command. Raises CapacityError or PodError with gcloud's message if it fails."""
        return self._checked(self.tried(words, flags, seconds=seconds))

    def created(self, words: Sequence[str], flags: Sequence[str], *, seconds: float = CREATE_SECONDS) -> bool:
        """Creates something; whether it was new. False if it was there. Raises as `call` does."""
        done = self.tried(words, flags, seconds=seconds)
        if done.code != 0 and EXISTS.search(done.err):
            return False
        self._checked(done)
        return True

    def answer(self, words: Sequence[str], flags: Sequence[str] = (), *, name: str | None = None) -> Any:
        """What a command answers as JSON; None if there is nothing of the name `name`. Raises as `call` does."""
        done = self.tried(words, [*flags, "--format=json"])
        if done.code != 0 and name is not None and is_absent(done.err, name):
            return None
        text = self._checked(done)
        try:
            return json.loads(text)
        except ValueError as error:
            raise PodError(f"gcloud {' '.join(words)} did not answer with JSON: {safe_message(text[:300])}") from error

    def tried(self, words: Sequence[str], flags: Sequence[str] = (), *, seconds: float = SECONDS) -> Done:
        """How a command ended, whatever its code. Raises PodError if gcloud is not on this machine."""
        try:
            return self.run(self.argv(words, flags), seconds=seconds)
        except FileNotFoundError as error:
            raise PodError(
                "gcloud is not on this machine. Install the Google Cloud CLI (cloud.google.com/sdk), then run "
                "`gcloud auth login`"
            ) from error

    def _checked(self, done: Done) -> str:
        if done.code == 0:
            return done.out
        raise error_of(done.err or done.out, self.pool, timed_out=done.code == TIMED_OUT)


def is_absent(message: str, name: str) -> bool:
    """Whether an error says that the thing of this name does not exist, and not that its zone or project does not."""
    return ABSENCE.search(message) is not None and name in message and EXISTS.search(message) is None


def error_of(message: str, pool: str, *, timed_out: bool = False) -> PodError:
    """The error for a message of an API, with the message itself. pool: where, in words."""
    text = _essence(message)
    if timed_out:
        return PodError(f"{pool}: no answer: {text}. Run the same command again")
    if QUOTA.search(text):
        return _elsewhere("quota", text, pool)
    for pattern, mend in MENDS:
        if pattern.search(text):
            return PodError(f"{pool}: {text}. {mend}")
    for what, pattern in ELSEWHERE:
        if pattern.search(text):
            return _elsewhere(what, text, pool)
    return PodError(f"{pool}: {text}. If it is of the moment, run the same command again")


def _elsewhere(what: str, text: str, pool: str) -> CapacityError:
    return CapacityError(
        f"{pool} gives no machines ({what}): {text}. Name more zones (--zone=A,B), wait (--queue_hours=H), or request "
        "quota of this pool"
    )


def _essence(message: str) -> str:
    """gcloud's message in one line, without its frame. It says why in the last lines, after progress and warnings."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    start = next((i for i, line in enumerate(lines) if line.startswith("ERROR:")), max(0, len(lines) - 8))
    return safe_message(" ".join(lines[start:]).removeprefix("ERROR: ").rstrip("."))
