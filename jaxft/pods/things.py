"""One thing that was created in Google Cloud: whose it is, and its deletion."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.errors import PodError
from jaxft.pods.command import TIMED_OUT, quoted
from jaxft.pods.gcloud import CREATE_SECONDS, Gcloud, error_of, is_absent
from jaxft.pods.request import LABEL

POLL_SECONDS = 10.0
POLLS = 180  # half an hour


@dataclass(frozen=True)
class Thing:
    """words: gcloud's words for its kind. name: its own. where: the flags that name its zone or region.

    kind: the word after `create` that some kinds have. delete_flags: that only a deletion takes.
    """

    gcloud: Gcloud
    words: tuple[str, ...]
    name: str
    where: tuple[str, ...] = ()
    kind: str | None = None
    delete_flags: tuple[str, ...] = ()

    @property
    def create(self) -> list[str]:
        """The words that create it."""
        return [*self.words, "create", *([self.kind] if self.kind else []), self.name]

    def description(self) -> dict[str, Any] | None:
        """What the API says of it; None if it is not there."""
        answer = self.gcloud.answer([*self.words, "describe", self.name], self.where, name=self.name)
        return answer if isinstance(answer, dict) else None

    def check(self, run: str) -> None:
        """Raises PodError if it is there and has not the label of this run."""
        described = self.description()
        if described is not None:
            self._check_label(described, run)

    def delete(self, run: str, sleep: Callable[[float], None]) -> None:
        """Deletes it, and returns once the API no longer knows of it. Raises PodError if it is not this run's."""
        described = self.description()
        if described is None:
            return
        self._check_label(described, run)
        words = [*self.words, "delete", self.name]
        done = self.gcloud.tried(words, [*self.where, *self.delete_flags], seconds=CREATE_SECONDS)
        if done.code != 0 and not is_absent(done.err, self.name):
            raise error_of(done.err, self.gcloud.pool, timed_out=done.code == TIMED_OUT)
        for _ in range(POLLS):
            if self.description() is None:
                return
            sleep(POLL_SECONDS)
        command = quoted(self.gcloud.argv(words, [*self.where, *self.delete_flags]))
        raise PodError(
            f"{self.gcloud.pool}: {self.name} is still there half an hour after its deletion began, and costs money. "
            f"Look at it, and delete it by hand: {command}"
        )

    def _check_label(self, described: dict[str, Any], run: str) -> None:
        if labels_of(described).get(LABEL) != run:
            raise PodError(
                f"{self.gcloud.pool}: {self.name} is there and does not have the label {LABEL}={run}, so that jaxft "
                "leaves it alone. Give the run another --name"
            )


def labels_of(described: Mapping[str, Any]) -> dict[str, str]:
    """The labels of something; of its machines where the kind has none of its own, or from its description."""
    queued = [spec.get("node", {}) for spec in described.get("tpu", {}).get("nodeSpec", [])]
    for one in (described, described.get("properties", {}), *queued):
        if one.get("labels"):
            return dict(one["labels"])
    key, _, value = str(described.get("description", "")).partition("=")
    return {key: value} if key == LABEL else {}
