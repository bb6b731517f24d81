"""Servers for tests: in a thread of this process, or in a process that can be killed."""

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from jaxft.serving.serve import Parts, serve
from jaxft.serving.settings import ServeSettings
from jaxft.serving.supervision.supervisor import Limits

HERE = Path(__file__).parent
STAND_IN = (sys.executable, "-S", str(HERE / "stand_in_worker.py"))
# The real engine, with one device as on most machines; compiling costs more than running at these sizes.
REAL_ENGINE = (
    "env", "-u", "XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS=1", sys.executable, "-m", "jaxft.serving.engine",
)  # fmt: skip
ENGINE = (sys.executable, "-S", str(HERE / "stand_in_engine.py"))
QUICK = Limits(look=0.02, kill=0.5, linger=5.0, drain=20.0)
MODEL = "tiny"
DEADLINE = 600.0  # of whatever is waited for, on a machine with other work


@dataclass
class Running:
    """A server that answers. key: one that may do everything. stop: begins to end it, if it is in a thread.
    told: what it has printed.
    """

    port: int
    key: str
    state: Path
    stop: Callable[[], None] = lambda: None
    told: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str | None = None, **settings: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=key or self.key, **{"max_retries": 0, **settings})


def settings_of(state: Path, model: str, **settings: Any) -> ServeSettings:
    return ServeSettings(models={MODEL: model}, state=state, **{"port": 0, **settings})


@contextlib.contextmanager
def in_thread(
    state: Path, model: str, limits: Limits = QUICK, parts: dict[str, Any] | None = None, **settings: Any
) -> Iterator[Running]:
    """A server in a thread, with the stand-in for workers, and with the real engine unless `parts` has another."""
    said: list[str] = []
    ready: queue.Queue[Any] = queue.Queue()
    replaced = {"worker": STAND_IN, "limits": limits, **(parts or {})}
    whole = Parts(**replaced, on_ready=lambda port, stop: ready.put((port, stop)))

    def run() -> None:
        try:
            serve(settings_of(state, model, **settings), said.append, whole)
        except BaseException as error:
            ready.put(error)
            raise

    thread = threading.Thread(target=run)
    thread.start()
    answer = ready.get(timeout=DEADLINE)
    if isinstance(answer, BaseException):
        raise answer
    port, stop = answer
    try:
        yield Running(port, _key(state, said), state, stop, said)
    finally:
        stop()
        thread.join(DEADLINE)
        assert not thread.is_alive()


def _key(state: Path, said: list[str]) -> str:
    """The first key, which a server says once; kept beside the state for servers that come later."""
    kept = state.with_name(f"{state.name}.key")
    if len(said) > 1:
        kept.write_text(said[1].rpartition(" ")[2])
    return kept.read_text()


class ServerProcess:
    """A server in a process of its own, with the stand-in for workers or with `worker`."""

    def __init__(self, state: Path, model: str, worker: str = str(HERE / "stand_in_worker.py")) -> None:
        self.state = state
        # Compiling costs more than running at these sizes; a worker has one device, as on most machines.
        env = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        env.pop("XLA_FLAGS", None)
        command = [sys.executable, str(HERE / "serve_stand_in.py"), str(state), model, worker]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        said = []
        for line in self.process.stdout:
            said.append(line.strip())
            if line.startswith("port "):
                break
        else:
            raise RuntimeError(f"the server ended with {self.process.wait()}: {said}")
        self.running = Running(int(said[-1].split()[1]), _key(state, said[:-1]), state)

    def end(self, number: int) -> int:
        """Sends a signal, and returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(DEADLINE)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """What the condition gives once it is true."""
    until, pause = time.monotonic() + DEADLINE, 0.01
    while not (value := condition()):
        assert time.monotonic() < until, f"{what} did not come"
        time.sleep(pause)
        pause = min(1.3 * pause, 0.5)
    return value


def write_model(folder: Path) -> str:
    """A folder with the tiny model that ships with jaxft, its weights drawn."""
    import numpy as np
    from safetensors.numpy import save_file

    from jaxft.assets import ASSETS

    shutil.copytree(ASSETS / "smoke", folder, ignore=shutil.ignore_patterns("*.jsonl"))
    config = json.loads((folder / "config.json").read_text())
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = D // config["num_attention_heads"] * config["num_key_value_heads"]
    draw = np.random.default_rng(0)
    tensors = {"model.embed_tokens.weight": draw.normal(0, 0.05, (V, D)), "model.norm.weight": np.ones(D)}
    for layer in range(config["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (D, D), "self_attn.k_proj": (kv, D), "self_attn.v_proj": (kv, D),
            "self_attn.o_proj": (D, D), "mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F),
        }  # fmt: skip
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = draw.normal(0, 0.05, shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(D)
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def write_adapter(folder: Path, base: str, seed: int, *, dora: bool = False) -> None:
    """Writes a LoRA of rank 4 for the tiny model, drawn so that it changes the answers."""
    import numpy as np
    from safetensors.numpy import save_file

    config = json.loads((Path(base) / "config.json").read_text())
    D, F = config["hidden_size"], config["intermediate_size"]
    targets = {"self_attn.q_proj": (D, D), "mlp.up_proj": (D, F), "mlp.down_proj": (F, D)}
    draw, tensors = np.random.default_rng(seed), {}
    for layer in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in targets.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = draw.normal(0, 0.5, (4, inputs)).astype(np.float32)
            tensors[f"{path}.lora_B.weight"] = draw.normal(0, 0.5, (outputs, 4)).astype(np.float32)
            if dora:
                tensors[f"{path}.lora_magnitude_vector"] = draw.uniform(0.5, 1.5, outputs).astype(np.float32)
    settings = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [name.partition(".")[2] for name in targets],
        "base_model_name_or_path": base, "use_dora": dora,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def rows(**row: Any) -> bytes:
    """A file of one row, which tells the stand-in what to do."""
    return json.dumps({"steps": 4, **row}).encode() + b"\n"


def upload(client: openai.OpenAI, content: bytes, name: str = "rows.jsonl") -> str:
    return client.files.create(file=(name, content), purpose="fine-tune").id


def create(client: openai.OpenAI, content: bytes, **settings: Any) -> Any:
    return client.fine_tuning.jobs.create(model=MODEL, training_file=upload(client, content), **settings)


def until(client: openai.OpenAI, id: str, *statuses: str) -> Any:
    """The job once it has one of the states."""

    def look() -> Any:
        job = client.fine_tuning.jobs.retrieve(id)
        ended = job.status in ("succeeded", "failed", "cancelled")
        assert job.status in statuses or not ended, f"{job.status}: {job.error}"
        return job if job.status in statuses else None

    return wait_for(look, f"{statuses} of {id}")


def messages(client: openai.OpenAI, id: str) -> list[str]:
    """The messages of all events of a job, oldest first, over several pages."""
    return [event.message for event in client.fine_tuning.jobs.list_events(id, limit=7)][::-1]
