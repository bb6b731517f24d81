"""`python -m jaxft.serving.worker FOLDER --goal=train --lock=N`: the worker of one job, which a server starts."""

import argparse
import sys
from pathlib import Path

from jaxft.errors import ExitCode, Preempted
from jaxft.serving.jobs.folder import JobFolder, JobSpec, read_object
from jaxft.serving.supervision.processes import enter_worker
from jaxft.serving.worker.examine import examine, final_config, tell_examined
from jaxft.serving.worker.telling import Telling, error_of


def main() -> ExitCode:
    """Does what remains of a job, and says in `outcome.json` how it ended; an error of the program leaves none."""
    parser = argparse.ArgumentParser(prog="jaxft.serving.worker", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--goal", choices=("validate", "train"), required=True)
    parser.add_argument("--lock", type=int, required=True)
    arguments = parser.parse_args()
    enter_worker(arguments.lock)
    folder = JobFolder(arguments.folder)
    spec = JobSpec.read(folder)
    telling = Telling(folder, spec)
    try:
        _work(spec, folder, telling, train=arguments.goal == "train")
    except Preempted as stopped:
        telling.outcome("stopped", step=stopped.step)
        return ExitCode.PREEMPTED
    except Exception as error:
        known = error_of(error, folder)
        if known is None:
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        telling.failed(known)
        return ExitCode.REFUSED
    return ExitCode.DONE


def _work(spec: JobSpec, folder: JobFolder, telling: Telling, *, train: bool) -> None:
    resolved = read_object(folder.resolved) or examine(spec, folder, telling)
    tell_examined(telling, resolved)
    config = final_config(spec, folder, resolved)
    if not train:
        telling.outcome("validated")
        return
    telling.phase("loading")
    from jaxft.serving.worker.training import train_job

    train_job(config, spec, folder, telling, resolved["examination"]["sequences"])


if __name__ == "__main__":
    sys.exit(main())
