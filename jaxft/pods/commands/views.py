"""`jaxft pod status`, `logs` and `list`: what runs do, and what exists and costs money."""

from typing import Any

from jaxft.errors import ConfigError, PodError
from jaxft.files.locks.lock import owner_now
from jaxft.hardware.prices import price_of
from jaxft.pods import command
from jaxft.pods.attempts.attempt import log_name
from jaxft.pods.attempts.follow import STEP
from jaxft.pods.attempts.front import Front, Outside
from jaxft.pods.attempts.hosts import HOST_ROOT, HostState
from jaxft.pods.attempts.launch import Records, folder_of
from jaxft.pods.attempts.lead import summary_of
from jaxft.pods.command import Run
from jaxft.pods.commands.record import Say, front_of, machines_of, outside_of
from jaxft.pods.owned import Owned, owned
from jaxft.terminal.text import safe_line, safe_text

LOG_BYTES = 200_000  # of a log in one look


def status(
    name: str, *, project: str | None = None, say: Say, run: Run = command.run, outside: Outside | None = None
) -> dict[str, Any]:
    """What a run does now: its machines, each host's last line, what it has cost. Raises PodError if it is unknown."""
    front = front_of(name, project, outside or outside_of(say, run))
    launch, now = front.launch, front.now()
    out = summary_of(front) | {"hour_usd": launch.hour_usd if launch.node else 0.0, "workers": [], "leader": None}
    out |= {"machines": None, "zone": None, "maintenance": None}
    leader = owner_now(front.records.folder, inside=True)
    out["leader"] = None if leader is None else leader.describe()
    say(f"run {name}: {launch.state}, {_attempt_words(front)}, goes to {front.request.to}")
    if launch.state == "open":
        say(f"led by {leader.describe()}" if leader else "led by nobody: the same `jaxft pod run` takes it up")
    if launch.message:
        say(launch.message)
    if launch.node is not None:
        state, hosts = machines_of(front)
        out |= {"machines": state.raw, "zone": launch.node.zone, "maintenance": state.maintenance}
        maintenance = f", maintenance announced for {state.maintenance}" if state.maintenance else ""
        say(f"node {launch.node.number} in {launch.node.zone}: {state.raw}{maintenance}")
        for one in hosts.states() if hosts is not None else []:
            out["workers"].append(_worker_json(one))
            say(_worker_line(one))
    say(f"{launch.hours(now):.2f} h, USD {launch.usd(now):.2f} so far, USD {out['hour_usd']:.2f} an hour now")
    return out


def logs(
    name: str, *, project: str | None = None, follow: bool = False, worker: int = 0, say: Say, run: Run = command.run,
    outside: Outside | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Shows the log of one worker's newest attempt, from its host or, once that is deleted, from --to.

    follow: shows what is written later too, until the run ends. Raises PodError if there is no such log.
    """
    front = front_of(name, project, outside or outside_of(say, run))
    shown: dict[int, int] = {}
    while True:
        launch = Records(front.records.folder).read() or front.launch
        front.launch = launch
        if not launch.attempts:
            if not follow or launch.state != "open":
                raise PodError(
                    f"run {name} has started no attempt yet: `jaxft pod status {name}` shows what it waits for"
                )
        else:
            number = launch.attempts[-1].number
            text = _new_text(front, number, worker, shown.get(number, 0))
            shown[number] = shown.get(number, 0) + len(text.encode())
            if text:
                say(safe_text(text.rstrip("\n")))
        if not follow or launch.state != "open":
            return {"name": name, "attempts": len(launch.attempts), "worker": worker}
        front.outside.sleep(front.outside.poll_seconds)


def list_runs(
    *, project: str | None = None, say: Say, run: Run = command.run, outside: Outside | None = None
) -> dict[str, Any]:
    """Everything with jaxft's label in a project, also of runs that this machine knows nothing of, and its cost."""
    things = owned(project, run)
    total, out = 0.0, []
    for one in sorted(things, key=lambda one: (one.run, one.name)):
        usd = _hour_usd(one)
        total += usd or 0.0
        known = Records(folder_of(one.run)).read() is not None
        price = f"USD {usd:.2f} an hour" if usd is not None else "no price" if one.chips else "no cost of its own"
        note = "" if known else "; this machine has no record of the run"
        say(
            f"{one.run}: {one.kind.name} {one.name} {one.where} {one.state}, since {one.since or 'unknown'}, "
            f"{price}{note}"
        )
        out.append({
            "run": one.run, "kind": one.kind.name, "name": one.name, "where": one.where, "state": one.state,
            "since": one.since, "chips": one.chips, "hour_usd": usd, "known": known,
        })  # fmt: skip
    say(f"{len(things)} things exist, USD {total:.2f} an hour" if things else "nothing exists, and nothing costs money")
    return {"things": out, "hour_usd": total}


def _attempt_words(front: Front) -> str:
    launch = front.launch
    if not launch.attempts:
        return "no attempt yet"
    last = launch.attempts[-1]
    return f"attempt {last.number}, {last.end or ('training' if last.started else 'being set up')}"


def _worker_json(one: HostState) -> dict[str, Any]:
    keys = ("worker", "attempt", "alive", "exit", "last_line", "log_age", "chips", "holders", "disk_free", "problem")
    step = STEP.search(one.last_line)
    return {key: getattr(one, key) for key in keys} | {"step": int(step[1]) if step else None}


def _worker_line(one: HostState) -> str:
    if one.problem is not None:
        return f"worker {one.worker}: {one.problem}"
    does = "runs" if one.alive else "is not started" if not one.attempt else f"has ended with {one.exit}"
    age = "no log" if one.log_age is None else f"{one.log_age:.0f} s ago: {safe_line(one.last_line)}"
    return f"worker {one.worker} {does}; {age}"


def _new_text(front: Front, attempt: int, worker: int, offset: int) -> str:
    """What the log of a worker has from a byte on."""
    hosts = None
    if front.launch.node is not None:
        _, hosts = machines_of(front)
    if hosts is not None:
        if worker >= len(hosts.workers):
            raise ConfigError(f"--worker={worker}: the run has workers 0 to {len(hosts.workers) - 1}")
        argv = ["bash", f"{HOST_ROOT}/worker/log.sh", hosts.run, str(attempt), str(offset), str(LOG_BYTES)]
        done = hosts.repeated(lambda: hosts.slices.ssh(hosts.workers[worker], argv))
        if done.code == 0:
            return done.out
    content = front.output.read(log_name(attempt, worker))
    if content is None and not offset:
        raise PodError(
            f"there is no log of worker {worker} of attempt {attempt} in {front.request.to}, and its machine cannot be "
            f"reached: `jaxft pod status {front.launch.name}` shows the machines"
        )
    return (content or b"")[offset:].decode("utf-8", "replace")


def _hour_usd(one: Owned) -> float | None:
    if one.chip is None:
        return None
    price = price_of(one.chip)
    usd = price.spot if one.spot else price.on_demand
    return None if usd is None else usd * one.chips
