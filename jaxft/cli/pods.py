"""`jaxft pod`: the verbs that run on TPUs of Google Cloud."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from jaxft.terminal import text as terminal

AddVerb = Callable[[Any, str, Callable[..., Any], str], Callable[..., Any]]


def add_verbs(verbs: Any, add: AddVerb) -> None:
    """Adds `pod` and its verbs. add: adds one verb, and returns what adds an option to it."""
    about = "a run on TPUs of Google Cloud, from the creation of the machines to their deletion"
    group = verbs.add_parser("pod", help=about, description=about, allow_abbrev=False)
    pods = group.add_subparsers(dest="pod_verb", required=True, metavar="VERB")

    def verb(name: str, call: Callable[..., Any], text: str) -> Callable[..., Any]:
        option = add(pods, name, call, text)
        pods.choices[name].set_defaults(verb=f"pod {name}")
        return option

    option = verb("list", list_runs, "every machine of a project that jaxft created, and what it costs an hour")
    option("--project", metavar="ID", help="of Google Cloud; gcloud's own by default")

    _add_manifest(verb("manifest", manifest, "write a file with which Kubernetes or SkyPilot runs the config on TPUs"))


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


def manifest(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft pod manifest`: the file, on standard output."""
    import yaml

    from jaxft.cli.training import config_of
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


def say_of(arguments: argparse.Namespace) -> Callable[[str], None]:
    """What prints a line about the run: on standard error with --json, and as a comment in a dry run."""
    comment = "# " if getattr(arguments, "dry_run", False) else ""

    def say(text: str) -> None:
        for line in terminal.safe_message(text).splitlines():
            terminal.write(f"{comment}{line}", error=arguments.json)

    return say


def list_runs(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft pod list`: all that is labelled in a project, and its cost of an hour."""
    from jaxft.hardware.prices import price_of
    from jaxft.pods.owned import owned
    from jaxft.pods.providers import project_of

    project = project_of(arguments.project)
    things, say, total, out = owned(project), say_of(arguments), 0.0, []
    for one in things:
        price = None if one.chip is None else price_of(one.chip)
        usd = 0.0 if price is None else one.chips * ((price.spot if one.spot else None) or price.on_demand)
        total += usd
        costs = f", USD {usd:.2f} an hour" if one.chips else ""
        say(f"{one.run}: {one.kind.name} {one.name} {one.where} {one.state} since {one.since}{costs}")
        out.append(
            {"run": one.run, "kind": one.kind.name, "name": one.name, "where": one.where, "state": one.state,
             "since": one.since, "usd_per_hour": usd}
        )  # fmt: skip
    say(f"project {project}: USD {total:.2f} an hour" if things else f"project {project}: nothing of jaxft is there")
    return {"project": project, "things": out, "usd_per_hour": total}
