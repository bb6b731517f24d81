"""A cloud on loopback for the real gcloud: what it keeps of the two APIs, and what a test scripts to go wrong.

It serves nodes and queued resources of the Cloud TPU API, and instances, instance templates, workload policies and
managed instance groups of Compute Engine, with their operations. Only `start` opens a port, on 127.0.0.1.
"""

import contextlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COLLECTIONS = {
    "nodes": "tpu", "queuedResources": "tpu", "instances": "compute", "instanceTemplates": "compute",
    "resourcePolicies": "compute", "instanceGroupManagers": "compute",
}  # fmt: skip
IDS = {"nodes": "nodeId", "queuedResources": "queuedResourceId"}


@dataclass
class Refusal:
    """An answer that is an error. status: of HTTP. message: what it says. code: its word, as RESOURCE_EXHAUSTED."""

    status: int
    message: str
    code: str = "UNKNOWN"


@dataclass
class Cloud:
    """What the loopback cloud has, and its script.

    log: the requests that change something, `METHOD collection/name`. refuse: called with (method, collection, name)
    before each such request; it returns a Refusal, or None. failed: called likewise before creations and returns the
    error {code, message} with which their operation ends, or None. states: the words that a thing's state takes, one
    for each time that it is read; the last one stays. members: of each group, as it lists them itself.
    lasting: how often a deleted thing is still read.
    """

    hosts: int = 1
    refuse: Callable[[str, str, str], Refusal | None] = lambda method, collection, name: None
    failed: Callable[[str, str], dict[str, Any] | None] = lambda collection, name: None
    states: dict[str, list[str]] = field(default_factory=dict)
    health: str = "HEALTHY"
    members: list[dict[str, Any]] = field(default_factory=list)
    lasting: int = 0
    log: list[str] = field(default_factory=list)
    things: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    leaving: dict[tuple[str, str], int] = field(default_factory=dict)
    operations: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    @property
    def alive(self) -> list[str]:
        """The names of all that is there, `collection/name`."""
        return [f"{collection}/{name}" for collection, name in self.things if (collection, name) not in self.leaving]

    def answer(self, method: str, path: str, query: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        """(HTTP status, JSON) of one request."""
        parts = [part for part in unquote(path).split("/") if part]
        if "operations" in parts:
            return 200, self.operations[parts[parts.index("operations") + 1]]
        if "aggregated" in parts:
            return 200, self._aggregated(parts[-1])
        if parts[-1] == "setCommonInstanceMetadata":  # gcloud brings the user's ssh key to all machines of a project
            scope = "/".join([*parts[parts.index("projects") : -1], "global"])
            return 200, self._operation("POST", "instances", scope, "metadata", None)
        collection = next((part for part in parts if part in COLLECTIONS), None)
        if collection is None:
            return 200, self._of_project(parts)
        at = parts.index(collection)
        name = parts[at + 1] if len(parts) > at + 1 else None
        scope = "/".join(parts[parts.index("projects") : at])
        if name is not None and name.endswith(":getGuestAttributes"):  # keys of hosts, which gcloud looks for there
            return 200, {"guestAttributes": []}
        if method == "PATCH":  # it brings the ssh key to a node
            node = {"@type": "type.googleapis.com/google.cloud.tpu.v2.Node", "name": f"{scope}/{collection}/{name}"}
            answer = self._operation(method, collection, scope, str(name), None)
            answer["response"] = node
            return 200, answer
        if name is not None and len(parts) > at + 2:  # the members of a group
            return (
                (200, {"managedInstances": self.members})
                if (collection, name) in self.things
                else _absent(collection, name)
            )
        return self._of_collection(method, collection, scope, name, query, body)

    def _of_collection(
        self, method: str, collection: str, scope: str, name: str | None, query: dict[str, str], body: dict[str, Any]
    ) -> tuple[int, Any]:
        if method == "GET":
            if name is None:
                word = collection if COLLECTIONS[collection] == "tpu" else "items"
                return 200, {word: [self._read(*key) for key in list(self.things) if key[0] == collection]}
            one = self._read(collection, name)
            return (
                (200, one)
                if one is not None
                else _error(Refusal(404, f"{collection} {name} was not found", "NOT_FOUND"))
            )
        name = name or query.get(IDS.get(collection, ""), "") or body["name"]
        self.log.append(f"{method} {collection}/{name}")
        refusal = self.refuse(method, collection, name)
        there = (collection, name) in self.things
        if refusal is None and method == "POST" and there:
            refusal = Refusal(409, f"{collection} {name} already exists", "ALREADY_EXISTS")
        if refusal is None and method == "DELETE" and not there:
            return _absent(collection, name)
        if refusal is not None:
            return _error(refusal)
        error = self.failed(collection, name) if method == "POST" else None
        if method == "POST" and error is None:
            self._create(collection, scope, name, body)
        if method == "DELETE":
            self._leave(collection, name)
        return 200, self._operation(method, collection, scope, name, error)

    def _create(self, collection: str, scope: str, name: str, body: dict[str, Any]) -> None:
        one = {**body, "name": name}
        self.things[collection, name] = one
        if COLLECTIONS[collection] == "tpu":
            one["name"] = f"{scope}/{collection}/{name}"
        else:
            one["selfLink"] = f"{self.url}/compute/v1/{scope}/{collection}/{name}"
            one["region" if "regions" in scope else "zone"] = f"{self.url}/compute/v1/{scope}"
        if collection == "nodes":
            hosts = range(self.hosts)
            one |= {"networkEndpoints": [{"ipAddress": f"10.0.{len(self.things)}.{host + 1}"} for host in hosts]}
        if collection == "queuedResources":
            for spec in body["tpu"]["nodeSpec"]:
                multi = spec.get("multisliceParams")
                prefix = (multi or {}).get("nodeIdPrefix") or name
                count = int(multi["nodeCount"]) if multi else 0
                for node in [f"{prefix}-{number}" for number in range(count)] if multi else [spec["nodeId"]]:
                    self._create("nodes", scope, node, {**spec["node"], "group": name})
        if collection == "instances":
            self._boot(one, 0)
        if collection == "instanceGroupManagers":
            template = self.things["instanceTemplates", body["instanceTemplate"].rpartition("/")[2]]["properties"]
            for host in range(int(body["targetSize"])):
                instance = f"{body['baseInstanceName']}-{host:04d}"
                self._create("instances", scope, instance, {**template, "group": name})
                self._boot(self.things["instances", instance], host)

    def _boot(self, one: dict[str, Any], host: int) -> None:
        one["networkInterfaces"] = [{"networkIP": f"10.1.{len(self.things)}.{host + 1}", "name": "nic0"}]
        one["metadata"] = {"items": [{"key": "worker-id", "value": str(host)}]}

    def _leave(self, collection: str, name: str) -> None:
        for key, one in list(self.things.items()):
            if key == (collection, name) or one.get("group") == name:
                self.leaving[key] = self.lasting
        for key in [key for key, left in self.leaving.items() if left == 0]:
            self.things.pop(key, None)
            del self.leaving[key]

    def _read(self, collection: str, name: str) -> dict[str, Any] | None:
        one = self.things.get((collection, name))
        if one is None:
            return None
        words = self.states.get(f"{collection}/{name}") or self.states.get(collection) or []
        if (collection, name) in self.leaving:
            self.leaving[collection, name] -= 1
            if self.leaving[collection, name] <= 0:
                self.things.pop((collection, name))
                del self.leaving[collection, name]
            words = ["DELETING" if collection != "instances" else "STOPPING"]
        word = words.pop(0) if len(words) > 1 else words[0] if words else None
        shown = {key: value for key, value in one.items() if key != "group"}
        if collection == "nodes":
            return shown | {"state": word or "READY", "health": self.health}
        if collection == "queuedResources":
            return shown | {"state": {"state": word or "ACTIVE"}}
        return shown | ({"status": word or "RUNNING"} if collection == "instances" else {})

    def _aggregated(self, collection: str) -> dict[str, Any]:
        items: dict[str, Any] = {}
        for key in list(self.things):
            if key[0] == collection and (one := self._read(*key)) is not None:
                scope = "/".join(one["selfLink"].split("/compute/v1/")[1].split("/")[2:4])
                items.setdefault(scope, {}).setdefault(collection, []).append(one)
        return {"items": items}

    def _of_project(self, parts: list[str]) -> dict[str, Any]:
        """Zones, regions and the like, which gcloud may ask for."""
        return {"name": parts[-1] if parts else "", "items": []}

    def _operation(
        self, method: str, collection: str, scope: str, name: str, error: dict[str, Any] | None
    ) -> dict[str, Any]:
        number = f"operation-{len(self.operations)}"
        if COLLECTIONS[collection] == "tpu":
            answer: dict[str, Any] = {"name": f"{scope}/operations/{number}", "done": True}
            answer |= (
                {"error": error} if error else {"response": {"@type": "type.googleapis.com/google.protobuf.Empty"}}
            )
        else:
            link = f"{self.url}/compute/v1/{scope}"
            answer = {
                "kind": "compute#operation", "name": number, "status": "DONE", "progress": 100,
                "selfLink": f"{link}/operations/{number}", "targetLink": f"{link}/{collection}/{name}",
                "operationType": "insert" if method == "POST" else "delete",
            }  # fmt: skip
            answer |= {"zone": link} if "zones" in scope else {"region": link} if "regions" in scope else {}
            answer |= {"error": {"errors": [error]}, "httpErrorStatusCode": 400} if error else {}
        self.operations[number] = answer
        return answer


def _absent(collection: str, name: str) -> tuple[int, Any]:
    return _error(Refusal(404, f"{collection} {name} was not found", "NOT_FOUND"))


def _error(refusal: Refusal) -> tuple[int, Any]:
    errors = [{"message": refusal.message, "reason": refusal.code}]
    return refusal.status, {
        "error": {"code": refusal.status, "message": refusal.message, "status": refusal.code, "errors": errors}
    }  # fmt: skip


@contextlib.contextmanager
def start(cloud: Cloud) -> Iterator[Cloud]:
    """Serves the cloud while the block runs; its address is `cloud.url`."""

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}") if length else {}
            address = urlsplit(self.path)
            query = {key: values[0] for key, values in parse_qs(address.query).items()}
            with cloud.lock:
                if "CLOUD_TRACE" in os.environ:
                    print(self.command, self.path, json.dumps(body)[:1500])
                status, answer = cloud.answer(self.command, address.path, query, body)
            raw = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_PATCH = do_DELETE = handle_one

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    cloud.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cloud
    finally:
        server.shutdown()
        server.server_close()


def environment(cloud: Cloud, folder: Path) -> dict[str, str]:
    """Variables with which gcloud talks with the loopback cloud, and can reach nothing else."""
    kept = {key: value for key, value in os.environ.items() if not re.search("proxy|CLOUDSDK|GOOGLE", key, re.I)}
    closed = "http://127.0.0.1:9"  # nobody listens there, so that nothing leaves by https
    return kept | {
        "CLOUDSDK_CONFIG": str(folder / "gcloud"),
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{cloud.url}/",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{cloud.url}/compute/v1/",
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
        "HOME": str(folder), "HTTPS_PROXY": closed, "https_proxy": closed, "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }  # fmt: skip
