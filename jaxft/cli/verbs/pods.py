"""`jaxft pod`: the verbs that run on TPUs of Google Cloud."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxft.cli import settings
from jaxft.cli.verbs.training import config_of
from jaxft.config import RunConfig
from jaxft.terminal import text as terminal

AddVerb = Callable[[Any, str, Callable[..., Any], str], Callable[..., Any]]
# Fields of Request that are options of the same name, with the value that they have without one.
PLAIN = (
    "topology", "to", "slices", "shared", "spot", "flex_start", "reservation", "api", "max_hours", "max_usd",
    "queue_hours", "retries", "stall_minutes", "keep_minutes", "internal_ip", "iap", "network", "subnetwork",
    "service_account", "disk_gb", "prices", "skip_plan", "detach", "dry_run",
)  # fmt: skip


def add_verbs(verbs: Any, add: AddVerb, config: dict[str, Any]) -> None:
    """Adds `pod` and its verbs. add: adds one verb, and returns what adds an option to it. config: of --config."""
    about = "a run on TPUs of Google Cloud, from the creation of the machines to their deletion"
    group = verbs.add_parser("pod", help=about, description=about, allow_abbrev=False)
    pods = group.add_subparsers(dest="pod_verb", required=True, metavar="VERB")

    def verb(name: str, call: Callable[..., Any], text: str) -> Callable[..., Any]:
        option = add(pods, name, call, text)
        pods.choices[name].set_defaults(verb=f"pod {name}")
        return option

    option = verb("run", run, "create the machines, train, bring the run home, delete the machines")
    option("--config", **config)
    settings.add_flags(pods.choices["run"])
    _add_machines(option)
    _add_limits(option)
    _add_access(option)

    for name, call, text in (
        ("status", status, "where a run is: its machines, step, last log lines, cost"),
        ("stop", stop, "end the training of a run after saving, and delete its machines; the same `pod run` goes on"),
        ("delete", delete, "delete all machines of a run; what is in its --to stays"),
    ):
        _add_name(verb(name, call, text))
    option = verb("logs", logs, "the log of a run, also of machines that are deleted")
    _add_name(option)
    option("--follow", action="store_true", help="go on printing new lines until the run ends")
    option("--worker", type=int, default=0, metavar="N", help="the host, counted over all slices")
    option = verb("fetch", fetch, "bring the results of a run to this machine, and verify them")
    _add_name(option)
    option("--to", metavar="FOLDER", help="where to; by default runs/NAME")

    option = verb("list", list_runs, "every machine of a project that jaxft created, and what it costs an hour")
    option("--project", metavar="ID", help="of Google Cloud; gcloud's own by default")

    _add_manifest(verb("manifest", manifest, "write a file with which Kubernetes or SkyPilot runs the config on TPUs"))


def _add_name(option: Callable[..., Any]) -> None:
    option("name", metavar="NAME", help="of the run")
    option("--project", metavar="ID", help="of Google Cloud; by default the one in which the run was started")


def _add_machines(option: Callable[..., Any]) -> None:
    option("--topology", required=True, metavar="NAME", help="one slice: v6e:4x4, v5p:2x2x2, v5e-8, ...")
    option("--slices", type=int, default=1, help="of this topology, joined by the data-centre network")
    option("--zone", required=True, metavar="ZONE[,ZONE2]", help="where to try, in this order")
    option("--to", required=True, metavar="gs://BUCKET/RUN|FOLDER", help="where the run and its logs go")
    option("--shared", action="store_true", help="--to is a folder that all hosts and this machine mount")
    option("--name", help="of the run and of all that is created; by default after output_dir")
    option("--project", metavar="ID", help="of Google Cloud; gcloud's own by default")
    option("--api", default="auto", help="compute (Compute Engine) or tpu (Cloud TPU API); auto: tpu for v4 and v5e")
    option("--spot", action="store_true", help="cheaper machines that may be taken away at any time")
    option("--flex_start", action="store_true", help="machines for a limited time, once there are some")
    option("--reservation", metavar="NAME", help="machines that are reserved")
    option("--disk_gb", type=int, default=200, help="boot disk of each host (Compute Engine)")


def _add_limits(option: Callable[..., Any]) -> None:
    option("--max_hours", type=float, default=24.0, help="in which machines exist, over all attempts")
    option("--max_usd", type=float, help="refuse a run that could cost more")
    option("--queue_hours", type=float, help="how long to wait for machines; without it a refusal ends the run")
    option("--retries", type=int, default=20, help="attempts after the first, each only if the last made progress")
    option("--stall_minutes", type=float, default=30.0, help="without a new log line, after which a run has hung")
    option("--keep_minutes", type=float, default=15.0, help="in which machines stay after an error, for a look")
    option("--prices", metavar="FILE", help="USD per chip-hour in place of jaxft's own table")
    option("--skip_plan", action="store_true", help="do not compile the step first to see whether it fits")


def _add_access(option: Callable[..., Any]) -> None:
    option("--env", action="append", default=[], metavar="KEY", help="a variable of this shell that hosts get as well")
    option("--internal_ip", action="store_true", help="hosts have no external address, and this machine is inside")
    option("--iap", action="store_true", help="hosts have no external address and are reached by IAP's tunnel")
    option("--network", metavar="NAME", help="of the hosts")
    option("--subnetwork", metavar="NAME", help="of the hosts")
    option("--service_account", metavar="EMAIL", help="of the hosts")
    option("--detach", action="store_true", help="leave once training has started")
    option("--dry_run", action="store_true", help="print every command and the worst case, and do nothing")


def _add_manifest(option: Callable[..., Any]) -> None:
    option("--kind", required=True, metavar="KIND", help="jobset, kueue or skypilot")
    option("--config", required=True, metavar="NAME[:ARG]", help="a shipped config, a .py or .yaml file, a run folder")
    option("--topology", required=True, metavar="NAME", help="of one slice: v6e:4x4, v5p:2x2x1, v5e-16, ...")
    option("--slices", type=int, default=1, help="of this topology, joined by the data-centre network")
    option("--to", required=True, metavar="gs://BUCKET/RUN", help="where the run goes")
    option("--name", help="of the run; by default from --to")
    option("--image", help="container with jaxft, for Kubernetes; see tpu_scripts/Dockerfile")
    option("--spot", action="store_true", help="machines that may be taken away")
    option("--reservation", metavar="NAME", help="machines of a reservation")
    option("--max_hours", type=float, default=24, help="of each attempt; with Kueue of all together")
    option("--retries", type=int, default=3, help="attempts after the first")
    option("--env", action="append", default=[], metavar="KEY", help="a variable that the hosts get from the secret")
    option("--secret", default="jaxft-env", help="the Secret of Kubernetes with HF_TOKEN and the variables of --env")
    option("--namespace", default="default", help="of Kubernetes")
    option("--service_account", metavar="NAME", help="of Kubernetes, which may write to the bucket")
    option("--queue", default="jaxft", help="the queue of Kueue")
    option("--zone", help="for SkyPilot; any by default")
    option("--prices", metavar="FILE", help="USD per chip-hour in place of jaxft's own table")


def request_of(arguments: argparse.Namespace, config: RunConfig, overrides: Sequence[str]) -> Any:
    """The request of the options. Raises ConfigError for what cannot be, and PodError if no project is known."""
    from jaxft.pods.providers import project_of
    from jaxft.pods.request import Request, name_of

    # A dry run asks nothing, not even gcloud.
    project = arguments.project if arguments.dry_run else project_of(arguments.project)

    return Request(
        name=arguments.name or name_of(config.output_dir),
        zones=tuple(zone.strip() for zone in arguments.zone.split(",") if zone.strip()),
        env=tuple(arguments.env),
        project=project,
        config=arguments.config,
        overrides=tuple(overrides),
        **{name: getattr(arguments, name) for name in PLAIN},
    )


def say_of(arguments: argparse.Namespace) -> Callable[[str], None]:
    """What prints a line about the run: on standard error with --json, and as a comment in a dry run."""
    comment = "# " if getattr(arguments, "dry_run", False) else ""

    def say(text: str) -> None:
        for line in terminal.safe_message(text).splitlines():
            terminal.write(f"{comment}{line}", error=arguments.json)

    return say


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft pod run`: the figures of the run once it has ended, or once it has started with --detach."""
    config = config_of(arguments, overrides)
    request = request_of(arguments, config, overrides)
    from jaxft.pods.run import run

    if not request.dry_run:
        return run(request, config, say=say_of(arguments))
    from jaxft.pods.attempts.rehearsal import HostAnswers
    from jaxft.pods.dry_run import DryRun

    def print_line(line: str) -> None:
        terminal.write(line, error=arguments.json)

    return run(request, config, say=say_of(arguments), run=DryRun(request, print_line, HostAnswers(request)))


def status(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft pod status`: the machines of a run, its step, its last lines and its cost."""
    from jaxft.pods.commands import status

    return status(arguments.name, project=arguments.project, say=say_of(arguments))


def logs(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft pod logs`: the log of one host."""
    from jaxft.pods.commands import logs

    return logs(
        arguments.name, project=arguments.project, follow=arguments.follow, worker=arguments.worker,
        say=say_of(arguments),
    )  # fmt: skip


def stop(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft pod stop`: ends the training of a run after saving."""
    from jaxft.pods.commands import stop

    return stop(arguments.name, project=arguments.project, say=say_of(arguments))


def fetch(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft pod fetch`: the results of a run, verified."""
    from jaxft.pods.commands import fetch

    return fetch(arguments.name, project=arguments.project, to=arguments.to, say=say_of(arguments))


def delete(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft pod delete`: all that was created for a run."""
    from jaxft.pods.commands import delete

    return delete(arguments.name, project=arguments.project, say=say_of(arguments))


def list_runs(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft pod list`: all that is labelled in a project, and its cost of an hour."""
    from jaxft.pods.commands import list_runs
    from jaxft.pods.providers import project_of

    return list_runs(project=project_of(arguments.project), say=say_of(arguments))


def manifest(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft pod manifest`: the file, on standard output."""
    import yaml

    from jaxft.pods.manifest import ManifestRequest, manifest
    from jaxft.pods.request import name_of

    fields = ManifestRequest.__dataclass_fields__
    given = {name: value for name, value in vars(arguments).items() if name in fields}
    given |= {"name": arguments.name or name_of(arguments.to), "env": tuple(arguments.env)}
    text = manifest(ManifestRequest(**given), config_of(arguments, overrides))
    if arguments.json:
        return {"kind": arguments.kind, "documents": list(yaml.safe_load_all(text))}
    sys.stdout.write(text)
    return None
