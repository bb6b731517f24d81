"""A cloud on paper: prints the commands that a run would issue, and answers them as if all went well."""

import json
import shlex
import threading
from collections.abc import Callable, Sequence
from typing import Any

from jaxft.pods.command import Done, quoted
from jaxft.pods.request import Request

VERBS = ("ssh", "scp", "create", "describe", "delete", "list-instances", "list")
WAITS = {"create": "again until the machines are ready", "delete": "again until the API no longer knows of it"}
POLICIES = "resource-policies"


class DryRun:
    """A `Run` without effects. Every machine is ready as soon as it is created, and nothing fails.

    print_line: gets each command as a line that can be pasted. host_answer: how a command on a host ends, by its argv.
    """

    def __init__(
        self, request: Request, print_line: Callable[[str], None], host_answer: Callable[[Sequence[str]], Done]
    ) -> None:
        self.request = request
        self.print_line = print_line
        self.host_answer = host_answer
        self._lock = threading.Lock()  # hosts may be reached from several threads
        self._waits = ""  # what the next question waits for
        self.created: dict[tuple[str, str], dict[str, Any]] = {}

    def __call__(self, argv: Sequence[str], *, stdin: bytes = b"", seconds: float | None = None) -> Done:
        """Prints the command, and answers it."""
        words = [word for word in argv[1:] if not word.startswith("--")]
        flags = dict(word[2:].partition("=")[::2] for word in argv if word.startswith("--"))
        verb = next((verb for verb in VERBS if verb in words), "")
        with self._lock:
            notes = [*(["and something on its standard input"] if stdin else []), *self._repeated(verb, flags)]
            self.print_line(quoted(argv) + (f"  # {', '.join(notes)}" if notes else ""))
        if not verb:
            return Done(0, "", "")
        at = words.index(verb)
        return self._answer(verb, words[at - 1], words[at + 1 :], flags)

    def _repeated(self, verb: str, flags: dict[str, str]) -> list[str]:
        """Until when a run repeats this command, in words; nothing if it issues it once."""
        command = flags.get("command", "")
        if verb in WAITS:
            self._waits = WAITS[verb]
        elif verb == "ssh":
            argv = shlex.split(command)
            of_attempt = len(argv) > 3 and argv[1].endswith("/state.sh")
            until = "the host answers" if command == "true" else "training has ended" if of_attempt else None
            return [] if until is None else [f"again until {until}"]
        elif verb and self._waits:
            waits, self._waits = self._waits, ""
            return [waits]
        return []

    def _answer(self, verb: str, kind: str, names: list[str], flags: dict[str, str]) -> Done:
        if verb == "ssh":
            return self.host_answer(tuple(shlex.split(flags["command"])))
        if verb == "create":
            kind, names = (POLICIES, names[1:]) if kind == POLICIES else (kind, names)
            for name in names:
                self._create(kind, name, flags)
        if verb == "delete":
            self._delete(kind, names[0])
        if verb == "describe":
            return self._described(self.created.get((kind, names[0])), names[0])
        if verb == "list-instances":
            return self._described([] if (kind, names[0]) in self.created else None, names[0])
        if verb == "list":
            return self._described([one for (what, _), one in self.created.items() if what == kind])
        return Done(0, "", "")

    def _described(self, answer: Any, name: str = "") -> Done:
        missing = f"ERROR: NOT_FOUND: {name} was not found"
        return Done(1, "", missing) if answer is None else Done(0, json.dumps(answer), "")

    def _create(self, kind: str, name: str, flags: dict[str, str]) -> None:
        labels = dict(pair.partition("=")[::2] for pair in flags.get("labels", "").split(",") if pair)
        one: dict[str, Any] = {"name": name, "labels": labels, "description": flags.get("description", "")}
        self.created[kind, name] = one
        if kind == "tpu-vm":
            hosts = range(self.request.hosts)
            one |= {"state": "READY", "networkEndpoints": [{"ipAddress": f"<{name} worker {host}>"} for host in hosts]}
        if kind == "queued-resources":
            one |= {"state": {"state": "ACTIVE"}, "tpu": {"nodeSpec": [{"node": {"labels": one.pop("labels")}}]}}
            prefix, count = flags.get("node-prefix"), int(flags.get("node-count", 1))
            nodes = [flags["node-id"]] if prefix is None else [f"{prefix}-{number}" for number in range(count)]
            for node in nodes:
                self._create("tpu-vm", node, flags)
                self.created["tpu-vm", node]["group"] = name
        if kind == "instances":
            one |= self._running(name, 0)
        if kind == "managed":
            labels = self.created["instance-templates", flags["template"]]["labels"]
            for host in range(int(flags["size"])):
                instance = f"{name}-{host:04d}"
                self.created["instances", instance] = {
                    "name": instance, "labels": labels, "group": name, **self._running(instance, host),
                }  # fmt: skip

    def _running(self, name: str, host: int) -> dict[str, Any]:
        return {
            "status": "RUNNING", "networkInterfaces": [{"networkIP": f"<address of {name}>"}],
            "metadata": {"items": [{"key": "worker-id", "value": str(host)}]},
        }  # fmt: skip

    def _delete(self, kind: str, name: str) -> None:
        self.created.pop((kind, name), None)
        own = [key for key, one in self.created.items() if one.get("group") == name]
        for key in own:
            self.created.pop(key, None)
