"""The trackers of a run."""

import os

from jaxft.config.fields import field_values
from jaxft.methods.method import Run
from jaxft.runs.identity.record import record_of
from jaxft.sharding.processes import is_primary
from jaxft.training.trackers import Tracked, Trackers


def trackers_of(run: Run) -> Trackers:
    """The trackers of train.report_to, in process 0; in other processes none.

    They are given the settings of the run and the digests of what it reads, and know it by the id of its record.
    """
    names = run.config.train.trackers if is_primary() else ()
    record = record_of(run.folder)
    values = {field.key: value for field, value in field_values(run.config) if not field.sections}
    values |= {f"digest.{key}": one["digest"] for key, one in record.reads.items()}
    name = os.path.basename(os.path.abspath(run.folder))
    return Trackers(names, Tracked(id=record.id, name=name, values=values), run.print_line)
