"""The command line: parses one verb and calls one function."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from jaxft.cli import settings
from jaxft.cli.errors import explained
from jaxft.cli.interrupts import interrupts_kept
from jaxft.cli.limits import check_address_space
from jaxft.cli.parser import make_parser
from jaxft.cli.streams import only_ascii, prepare_streams, show_progress
from jaxft.errors import ExitCode
from jaxft.terminal import text as terminal

QUIET = {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def main(argv: Sequence[str] | None = None) -> ExitCode:
    """Runs one command and returns its exit code, also if an error ended it."""
    prepare_streams()
    # transformers would say that torch is absent, which jaxft does not use. Other programs' settings come first.
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    # It misses kernels that the checks of exports do not need.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    terminal.protect_logs()
    show_progress()
    parser = make_parser()
    given = settings.underscored(sys.argv[1:] if argv is None else argv)
    arguments, rest = parser.parse_known_args(given)
    with interrupts_kept():
        return _run(arguments, rest, given)


def _run(arguments: argparse.Namespace, rest: Sequence[str], given: Sequence[str]) -> ExitCode:
    try:
        settings.refuse_undecoded(given)
        check_address_space(arguments.verb)
        takes_config = hasattr(arguments, "config") or arguments.verb in ("quickstart", "serve")
        overrides = settings.read_overrides(rest, arguments.options, arguments.verb, takes_config=takes_config)
        result = arguments.call(arguments, settings.with_flags(arguments, overrides))
        if arguments.json and result is not None:
            print(terminal.safe_json(result, only_ascii=only_ascii()))
        if sys.stdout is not None:
            sys.stdout.flush()  # so that a full disk behind it is known here
    except BaseException as error:  # also panics of libraries in Rust, whose class is no Exception
        if isinstance(error, SystemExit | GeneratorExit):
            raise
        return explained(arguments.verb, error, debug=arguments.debug)
    return ExitCode.DONE
