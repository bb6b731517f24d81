"""The servers of Google that the scripts on a host call, on loopback."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

TOKEN = "ya29.the-token-of-the-service-account"
TPU = "/v2/projects/p1/locations/us-east5-a"
COMPUTE = "/compute/v1/projects/p1/zones/us-east5-a"
NODE = f"{TPU}/nodes/r1-1"
IAM = "/v1/projects/p1:testIamPermissions"


class Google:
    """Metadata, TPU, IAM and storage APIs in one. answers: the status by (method, path), 404 for what is not there.

    requests: (method, path with query) in order. objects: what was uploaded, by name.
    """

    def __init__(self) -> None:
        self.metadata = {
            "instance/service-accounts/default/token": json.dumps({"access_token": TOKEN, "expires_in": 3599}),
            "instance/service-accounts/default/scopes": "https://www.googleapis.com/auth/cloud-platform\n",
            "instance/zone": "projects/123/zones/us-east5-a",
            "instance/attributes/tpu-env": "ACCELERATOR_TYPE: 'v6e-8'\nCONSUMER_PROJECT_ID: 'p1'\nNODE_ID: 'r1-1'\n",
        }
        self.permissions = ["tpu.nodes.delete"]
        self.answers = {("GET", NODE): 200, ("DELETE", NODE): 200, ("POST", IAM): 200}
        self.requests: list[tuple[str, str]] = []
        self.objects: dict[str, bytes] = {}
        self.upload_status = 200
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, text = outer.answer(self.command, self.path, dict(self.headers), body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> tuple[int, str]:
        url = urlsplit(target)
        if url.path.startswith("/computeMetadata/v1/"):
            value = self.metadata.get(url.path.removeprefix("/computeMetadata/v1/"))
            known = value is not None and headers.get("Metadata-Flavor") == "Google"
            return (200, value or "") if known else (404, "")
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, ""
        self.requests.append((method, target))
        if url.path.startswith("/upload/storage/v1/b/"):
            if self.upload_status == 200:
                self.objects[f"{url.path.split('/')[5]}/{parse_qs(url.query)['name'][0]}"] = body
            return self.upload_status, "{}"
        status = self.answers.get((method, url.path), 404)
        if url.path == IAM and status == 200:
            wanted = json.loads(body)["permissions"]
            return 200, json.dumps({"permissions": [one for one in wanted if one in self.permissions]})
        return status, "{}"

    def deletes(self) -> list[str]:
        return [target for method, target in self.requests if method == "DELETE"]

    @property
    def environment(self) -> dict[str, str]:
        """By which the scripts of a host find this server, and look at it often."""
        names = ("JAXFT_METADATA", "JAXFT_TPU_API", "JAXFT_COMPUTE_API", "JAXFT_IAM_API", "STORAGE_EMULATOR_HOST")
        return {**dict.fromkeys(names, self.address), "JAXFT_GUARD_POLL": "0.3", "JAXFT_UPLOAD_POLL": "0.3"}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
