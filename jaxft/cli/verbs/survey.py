"""The verbs that look at what is there: runs and verify at what was written, doctor at this machine."""

import argparse
from collections.abc import Sequence
from typing import Any

from jaxft.cli.streams import only_ascii
from jaxft.errors import CheckpointError, ConfigError, counted
from jaxft.terminal import text as terminal


def runs(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft runs`: the runs below a folder with their states."""
    from jaxft.runs.survey import listing

    states = listing.runs_below(arguments.folder)
    if not arguments.json:
        width = max((len(run.state) for run in states), default=0)
        for run in states:
            folder = terminal.safe_line(run.folder)
            terminal.write(f"{run.state:<{width}}  {folder}  {listing.describe(run)}")
        terminal.write(listing.summarize(states))
    return {"folder": arguments.folder, "runs": [run.to_json() for run in states]}


def verify(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft verify`: what is whole and what is broken. Raises CheckpointError if anything is broken."""
    from jaxft.runs.survey.findings import BROKEN
    from jaxft.runs.survey.verify import verify

    findings = verify(arguments.path, rows=not arguments.no_rows)
    result = {"path": arguments.path, "whole": findings.is_whole, "parts": findings.to_json()}
    if not arguments.json:
        for one in findings.all:
            terminal.write(f"{one.state:<11}  {terminal.safe_line(one.part)}: {one.text}")
            if one.mend is not None:
                terminal.write(f"{'':<11}    {one.mend}")
    if findings.is_whole:
        return result
    if arguments.json:
        print(terminal.safe_json(result, only_ascii=only_ascii()))
    broken = sum(one.state == BROKEN for one in findings.all)
    raise CheckpointError(
        f"{arguments.path} is not whole: {counted(broken, 'finding')} of {len(findings.all)} "
        f"{'is' if broken == 1 else 'are'} damage, each with how to mend it on standard output"
    )


def doctor(arguments: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """`jaxft doctor`: what this machine has. Raises ConfigError if something keeps runs from working."""
    if arguments.seconds <= 0:
        raise ConfigError(f"--seconds={arguments.seconds:g}: JAX needs some time to start. Leave it out for a minute")
    from jaxft.doctor.examine import examine

    parts = examine(arguments.output_dir, seconds=arguments.seconds, look=not arguments.no_devices)
    wrong = [part for part in parts if not part.is_sound]
    result = {"sound": not wrong, "parts": [part.to_json() for part in parts]}
    if not arguments.json:
        width = max(len(part.name) for part in parts)
        for part in parts:
            state = "ok" if part.is_sound else "problem"
            terminal.write(f"{state:<7}  {part.name:<{width}}  {terminal.safe_message(part.text)}")
            if part.mend is not None:
                terminal.write(f"{'':<7}  {'':<{width}}  {terminal.safe_message(part.mend)}")
    if not wrong:
        return result
    if arguments.json:
        print(terminal.safe_json(result, only_ascii=only_ascii()))
    names = ", ".join(part.name for part in wrong)
    raise ConfigError(f"{counted(len(wrong), 'problem')}, each with what to do about it on standard output: {names}")
