"""`jaxft serve`: the server, and the keys of its clients."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxft.errors import ConfigError, did_you_mean
from jaxft.home import local_path
from jaxft.terminal import text as terminal

ACTIONS = ("add", "list", "revoke")


def add_options(option: Callable[..., Any], bytes_of: Callable[[str], int]) -> None:
    """The options of `jaxft serve`. bytes_of: reads a size."""
    option("keys", nargs="*", metavar="keys add|list|revoke", help="make, show or revoke keys of clients")
    option("--state", required=True, metavar="FOLDER", help="where files, jobs, models and keys are kept")
    option(
        "--model",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a base to fine-tune and to ask; once for each",
    )
    option("--host", default="127.0.0.1", help="the address to listen at; another one needs TLS or a proxy")
    option("--port", type=int, default=8000, help="0 takes a free one")
    option("--hosts", action="append", default=[], metavar="NAME", help="another name under which clients reach it")
    option("--tls_cert", metavar="FILE", help="certificate chain, PEM")
    option("--tls_key", metavar="FILE", help="private key, PEM")
    option("--tls_proxy", action="store_true", help="a proxy on this machine or network speaks TLS for it")
    option("--context", type=int, default=2048, help="tokens of a training sequence, and of a prompt with its answer")
    option("--slots", type=int, default=8, help="answers of a model at a time; memory grows with slots times context")
    option("--queue", type=int, default=64, help="answers that may wait for a slot")
    option("--adapters", type=int, default=8, help="tuned models that answer on one base at a time")
    option("--max_rank", type=int, default=64, help="largest rank of such an adapter")
    option(
        "--while_training",
        choices=("auto", "answer", "wait"),
        default="auto",
        help="whether answers go on while a job trains; auto: only on a CPU",
    )
    option("--max_upload", type=bytes_of, default="8GB", metavar="SIZE", help="largest file")
    option("--price_per_hour", type=float, metavar="X", help="of this machine, for the estimated price of a job")
    option("--name", default="", help="of a new key")
    option("--scopes", default="train", metavar="LIST", help="of a new key: answer, train, admin")
    option("--id", metavar="KEY_ID", help="of the key to revoke")


def serve(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft serve` and `jaxft serve keys ...`."""
    if arguments.keys:
        return _keys(arguments)
    from jaxft.serving.serve import log_to_stderr
    from jaxft.serving.serve import serve as run
    from jaxft.serving.settings import ServeSettings, parse_models

    settings = ServeSettings(
        models=parse_models(arguments.model),
        state=Path(local_path(arguments.state)),
        host=arguments.host,
        port=arguments.port,
        hosts=tuple(arguments.hosts),
        tls_cert=None if arguments.tls_cert is None else local_path(arguments.tls_cert),
        tls_key=None if arguments.tls_key is None else local_path(arguments.tls_key),
        tls_proxy=arguments.tls_proxy,
        context=arguments.context,
        max_upload=arguments.max_upload,
        slots=arguments.slots,
        queue=arguments.queue,
        adapters=arguments.adapters,
        max_rank=arguments.max_rank,
        while_training=arguments.while_training,
        price_per_hour=arguments.price_per_hour,
        overrides=tuple(overrides),
    )
    log_to_stderr()
    run(settings, lambda text: print(terminal.safe_message(text), flush=True))
    return None


def _keys(arguments: argparse.Namespace) -> Any:
    from jaxft.serving.storage import keys
    from jaxft.serving.storage.state import open_state

    action = " ".join(arguments.keys[1:]) if arguments.keys[0] == "keys" else ""
    if action not in ACTIONS:
        given = " ".join(arguments.keys)
        known = [f"keys {one}" for one in ACTIONS]
        raise ConfigError(f"jaxft serve {given}: known are {', '.join(known)}.{did_you_mean(given, known)}")
    with open_state(local_path(arguments.state), exclusive=False) as state:
        if action == "add":
            key = keys.add_key(state.db, arguments.name, [one.strip() for one in arguments.scopes.split(",")])
            return _shown(arguments, {"key": key}, [key])
        if action == "revoke":
            if arguments.id is None:
                raise ConfigError("which key? --id=KEY_ID; `jaxft serve keys list` shows the ids")
            row = keys.revoke_key(state.db, arguments.id)
            return _shown(arguments, row, [f"revoked {row['id']}"])
        rows = keys.list_keys(state.db)
        return _shown(arguments, rows, [_line(row) for row in rows])


def _line(row: dict[str, Any]) -> str:
    return "  ".join([row["id"], row["scopes"], *(["revoked"] if row["revoked_at"] else []), row["name"]])


def _shown(arguments: argparse.Namespace, result: Any, lines: Sequence[str]) -> Any:
    """The result, for --json; without it, printed lines."""
    if not arguments.json:
        for line in lines:
            print(terminal.safe_message(line))
    return result
