"""An engine that holds no model: it keeps to the lines of the real one, and does what a request's last text says.

That text is a JSON object: pieces (of the text), thoughts, calls, reason, pause (seconds before each piece), wait
(until a file `go` is in its folder, or it is cancelled), die (after the first piece), refuse (a code). Cancelled
requests are written into a file `cancelled` there, `--folder=` of the command. While a file `hold` is there, it neither
becomes ready nor ends. It imports nothing of jaxft, so that it starts at once.
"""

import json
import os
import signal
import socket
import sys
import threading
import time

FOLDER = sys.argv[1].partition("=")[2]
CONNECTION = socket.socket(fileno=int(sys.argv[2].partition("=")[2]))
LOCK = threading.Lock()
cancelled = set()


def path(name):
    return os.path.join(FOLDER, name)


def tell(**message):
    with LOCK:
        CONNECTION.sendall(json.dumps(message).encode() + b"\n")


def hold():
    while os.path.exists(path("hold")):
        time.sleep(0.005)


def answer(request):
    id = request["id"]
    prompts = [request["messages"][-1]["content"]] if request["kind_of"] == "chat" else request["prompts"]
    todo = json.loads(prompts[0])
    if "refuse" in todo:
        tell(id=id, kind="refused", message="no", code=todo["refuse"], param="messages")
        return
    tell(id=id, kind="begun")
    tokens = 0
    for index in range(len(prompts) * request["settings"]["n"]):
        for piece in todo.get("pieces", ["Hello", " there"]):
            time.sleep(todo.get("pause", 0))
            while todo.get("wait") and not os.path.exists(path("go")) and id not in cancelled:
                time.sleep(0.005)
            if id in cancelled:
                return
            token = {"token": piece, "logprob": -0.5, "bytes": list(piece.encode())}
            top = [token] * request["settings"]["alternatives"]
            logprobs = {"logprobs": [token | ({"top": top} if top else {})]} if request["settings"]["logprobs"] else {}
            tell(id=id, kind="piece", index=index, text=piece, **logprobs)
            tokens += 1
            if todo.get("die"):
                os.kill(os.getpid(), signal.SIGKILL)
        if "thoughts" in todo:
            tell(id=id, kind="piece", index=index, thoughts=todo["thoughts"])
        calls = {"calls": todo["calls"]} if "calls" in todo else {}
        tell(id=id, kind="ended", index=index, reason=todo.get("reason", "stop"), **calls)
    tell(id=id, kind="done", prompt_tokens=7, completion_tokens=tokens)


def main():
    lines = CONNECTION.makefile("rb")
    spec = json.loads(lines.readline())
    with open(path("spec.json"), "w") as file:
        json.dump(spec, file)
    with open(path("starts"), "a") as file:
        file.write(f"{os.getpid()}\n")
    if os.path.exists(path("broken")):
        tell(kind="failed", message="no such model")
        sys.exit(2)
    tell(kind="phase", phase="loading")
    hold()
    tell(kind="ready", devices={"platform": "none", "kind": "none", "count": 1})
    tell(kind="phase", phase="warm")
    for line in lines:
        message = json.loads(line)
        if message["kind"] == "cancel":
            cancelled.add(message["id"])
            with open(path("cancelled"), "a") as file:
                file.write(message["id"] + "\n")
        else:
            with open(path("asked"), "a") as file:
                file.write(line.decode())
            threading.Thread(target=answer, args=(message,), daemon=True).start()
    hold()


main()
