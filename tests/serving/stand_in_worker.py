"""A worker that trains nothing: it keeps to the files and signals of the real one, and does what its first row says.

The row is an object: steps, pause (seconds of a step), epoch (steps between checkpoints), bad (a message: the rows
are refused), wait (a step after which it waits for a file `go` in its folder, or SIGTERM), die (steps at which it is
killed, each once; at 0 after it has written resolved.json), fail (a message), deaf (it ignores SIGTERM), always_die,
resolved (put into resolved.json).
It imports nothing of jaxft, so that it starts at once.
"""

import json
import os
import signal
import sys
import time

FOLDER, GOAL, LOCK = sys.argv[1], sys.argv[2].partition("=")[2], int(sys.argv[3].partition("=")[2])
stopping = False


def stop(number, frame):
    global stopping
    stopping = True


def path(*names):
    return os.path.join(FOLDER, *names)


def flush(*names):
    descriptor = os.open(path(*names), os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(name, value):
    with open(path(f"{name}.new"), "w") as file:
        json.dump(value, file)
    flush(f"{name}.new")
    os.replace(path(f"{name}.new"), path(name))
    flush()


def tell(kind, message="", step=0, **data):
    with open(path("events.jsonl"), "a") as file:
        file.write(json.dumps({"kind": kind, "step": step, "message": message, "data": data}) + "\n")


def end(code, state, **values):
    write("outcome.json", {"state": state, **values})
    sys.exit(code)


def export(name, step):
    os.makedirs(path("exports", f"{name}.new"))
    with open(path("exports", f"{name}.new", "adapter_config.json"), "w") as file:
        json.dump({"step": step}, file)
    flush("exports", f"{name}.new", "adapter_config.json")
    flush("exports", f"{name}.new")
    os.rename(path("exports", f"{name}.new"), path("exports", name))
    flush("exports")


def save(step):
    os.makedirs(path("run", "checkpoints", str(step)), exist_ok=True)
    flush("run", "metrics.jsonl")
    open(path("run", "checkpoints", str(step), "manifest.json"), "w").close()
    for folder in (("checkpoints", str(step)), ("checkpoints",), ()):
        flush("run", *folder)
    flush()


def newest():
    folder = path("run", "checkpoints")
    return max(map(int, os.listdir(folder)), default=0) if os.path.isdir(folder) else 0


def die(row, step):
    mark = path(f"died-{step}")
    if step in row.get("die", ()) and (row.get("always_die") or not os.path.exists(mark)):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)


def train(row):
    os.makedirs(path("run"), exist_ok=True)
    start, metrics, before = newest(), path("run", "metrics.jsonl"), []
    if start:
        with open(metrics) as file:
            before = file.readlines()[:start]
    with open(f"{metrics}.new", "w") as file:  # rows of steps that are taken again are removed
        file.writelines(before)
    os.replace(f"{metrics}.new", metrics)
    tell("started", "Fine-tuning job started", devices={"platform": "none", "count": 1})
    tell("phase", phase="training")
    for step in range(start + 1, row["steps"] + 1):
        time.sleep(row.get("pause", 0.0))
        with open(metrics, "a") as file:
            line = {"step": step, "loss": 1 / step, "mean_token_accuracy": 0.5, "step_seconds": 0.5}
            file.write(json.dumps(line) + "\n")
        while step == row.get("wait") and not stopping and not os.path.exists(path("go")):
            time.sleep(0.01)
        die(row, step)
        if step % row.get("epoch", 10**9) == 0 and step < row["steps"]:
            save(step)
            if not os.path.isdir(path("exports", f"step-{step}")):
                export(f"step-{step}", step)
            tell("checkpoint", step=step)
        if stopping:
            save(step)
            end(75, "stopped", step=step)
    flush("run", "metrics.jsonl")  # as the last step of a run does


def main():
    with open(path("training.jsonl")) as file:
        row = json.loads(file.readline())
    signal.signal(signal.SIGTERM, signal.SIG_IGN if row.get("deaf") else stop)
    os.pwrite(LOCK, f"{os.getpid()}\n".encode(), 0)
    if "bad" in row:
        end(2, "failed", error={"code": "invalid_file", "message": row["bad"], "param": "training_file"})
    if not os.path.exists(path("resolved.json")):
        numbers = {"n_epochs": 3, "batch_size": 2, "learning_rate_multiplier": 1.0}
        plan, examination = {"steps": row["steps"]}, {"rows": 1}
        resolved = {"hyperparameters": numbers, "plan": plan, "examination": examination}
        write("resolved.json", {**resolved, **row.get("resolved", {})})
        die(row, 0)
    tell("validated", "Files validated")
    if GOAL == "validate":
        end(0, "validated")
    train(row)
    if "fail" in row:
        end(2, "failed", error={"code": "diverged", "message": row["fail"], "param": None})
    export("final", row["steps"])
    end(0, "succeeded", step=row["steps"], trained_tokens=row["steps"])


main()
