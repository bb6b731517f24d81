"""Checkpoints of a run: written by Orbax in the background, restored bit for bit.

A step is a folder `<step>/` with Orbax's `state/` and `meta/` and, written last, `manifest.json`. It becomes
whole in this order: Orbax writes it under another name; all processes flush its files and the entries of its folders to
the disk; the first step that a run saves is read back; the manifest is written and flushed; the folder gets its name,
and that entry is flushed. Only then are old steps deleted, and renamed first. So no crash and no power cut leaves half
a folder under a step's name, or fewer whole steps than before (`steps/folders.py` has the names).

Orbax's AsyncCheckpointer is used without its CheckpointManager, which deletes old steps as soon as the new one has its
name: before our manifest exists.
"""

import contextlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from jaxft.checkpoint import manifest
from jaxft.checkpoint.finite import check_state
from jaxft.checkpoint.steps import read_back
from jaxft.checkpoint.steps.abandoned import SaveThreads
from jaxft.checkpoint.steps.access import steps_in
from jaxft.checkpoint.steps.layout import abstract_arrays, as_arrays, as_state, layout
from jaxft.checkpoint.steps.quiet import quiet_libraries
from jaxft.checkpoint.steps.reader import reader
from jaxft.checkpoint.steps.saved_step import SavedStep, find_averages
from jaxft.checkpoint.steps.shared_sums import SharedSums, help_with
from jaxft.errors import CheckpointError, Preempted
from jaxft.files.atomic import FilePath, flush
from jaxft.sharding.processes import is_primary

UNSHARED_SECONDS = 60  # for a save under way, after an error of one process of several

_saves = itertools.count()  # every process makes the same saves in the same order
_verifications = itertools.count()  # likewise


class _Step(NamedTuple):
    step: int
    metrics: Mapping[str, float] | None


class _Save(NamedTuple):
    """One save. path: to which Orbax writes. expected: what is to be read back."""

    step: int
    number: int
    path: Any
    metrics: Mapping[str, float]
    expected: read_back.Copies


class RunCheckpoints:
    """The checkpoints of one run, in one folder that every process sees.

    keep: the number of newest steps that are kept. best_metric: also keep the one step that is best by this entry of
    `metrics`. best_mode: `min` or `max`. ranked_after: the steps up to this one are not ranked, because they were
    evaluated on other rows. late_metrics: of steps that were saved before they were evaluated. read_only: only restore;
    nothing in the folder is created or removed, so that it is safe while a run writes there. logs: files, such as the
    metrics, that reach the disk with every step if they are there. Raises CheckpointError for a bucket address, and for
    steps that are links or were renamed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int,
        best_metric: str | None = None,
        best_mode: str = "min",
        ranked_after: int = 0,
        late_metrics: Mapping[int, Mapping[str, float]] | None = None,
        read_only: bool = False,
        logs: Iterable[FilePath] = (),
    ) -> None:
        if keep < 1 or best_mode not in ("min", "max"):
            raise CheckpointError(f"keep={keep} must be at least 1 and best_mode={best_mode!r} be min or max")
        self._steps = steps_in(folder)
        self.folder: Path | str = self._steps.folder
        self._read_only, self._best_metric, self._ranked_after = read_only, best_metric, ranked_after
        self._logs, self._read_back = tuple(Path(path) for path in logs), False
        self._newest = policies.LatestN(keep)
        self._best: policies.PreservationPolicy | None = None
        if best_metric is not None:
            self._best = policies.BestN(
                get_metric_fn=lambda metrics: metrics[best_metric],
                reverse=best_mode == "min",  # Orbax keeps the end of the sorted list
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        quiet_libraries()
        self._orbax = _async_checkpointer()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self._last: int | None = None  # saved or restored by this object
        self._failed = False  # a save
        self._threads = SaveThreads()
        if not read_only:
            self._steps.check_access()
            if is_primary():
                self._steps.prepare()
            _sync("checkpoints_cleaned")
        steps = self.all_steps() if best_metric is not None else ()
        late = late_metrics or {}
        self._metrics: dict[int, Any] = {}
        for step in steps:
            self._metrics[step] = self._steps.read_meta(step)["metrics"] or late.get(step, {})

    def save(self, step: int, state: Any, extra: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> bool:
        """Begins to write a step; returns when the arrays are copied from the devices and may be donated.

        state: pytree of jax.Arrays, typed PRNG keys included, without the parts that need no saving. extra: JSON.
        Returns False if this object has just saved or restored the same step, which is ranked by these metrics now.
        Raises CheckpointError for an error of the PREVIOUS save (a full disk shows here), a step that is not newer than
        all that exist, a leaf that is not a jax.Array, an array that is not finite, an extra that is not JSON.
        """
        self.wait()
        if step == self._last:
            self._metrics |= {step: metrics} if metrics else {}
            return False
        newest = self.latest_step()
        if self._read_only or (newest is not None and step <= newest):
            why = "these checkpoints were opened read-only" if self._read_only else f"step {newest} exists already"
            raise CheckpointError(
                f"step {step} was not saved to {self.folder}: {why}. Train into another folder, or delete the "
                "newer steps."
            )
        arrays = as_arrays(state)
        check_state(step, arrays, self._whole())
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        meta = {
            "step": step, "layout": layout(state), "averages": find_averages(state), "metrics": metrics,
            "extra": dict(extra),
        }  # fmt: skip
        try:
            json.dumps(meta)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"extra of step {step} is not JSON: {error}") from error
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
        expected = {} if self._read_back or not is_primary() else read_back.copies(arrays)
        number = next(_saves)
        self._threads = SaveThreads()
        try:
            self._drop_error()
            path = self._steps.begin(step, number)
            self._orbax.save(path, args=items)
        except Exception as error:  # Orbax promises no types; nothing is swallowed
            self._failed = True
            self._threads.end()
            raise self._not_saved(step, error) from error
        self._pending = (step, self._background.submit(self._finish, _Save(step, number, path, metrics, expected)))
        self._last = step
        return True

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]] | None:
        """The newest whole step (or `step`) and its extra; None if there is none.

        abstract_state: pytree of ShapeDtypeStructs or arrays; each leaf is restored onto its sharding, from whichever
        devices it was saved. Raises CheckpointError for a damaged step, naming the files, and for a tree, shape or
        dtype that differs from abstract_state, listing the paths.
        """
        saved = self.open(step)
        if saved is None:
            return None
        saved.check_fits(abstract_state)
        wanted = ocp.args.StandardRestore(abstract_arrays(abstract_state))
        with reader(ocp.CompositeCheckpointHandler()) as checkpointer:
            items = ocp.args.Composite(state=wanted)
            arrays = saved.read(lambda folder: checkpointer.restore(folder, args=items).state)
        self._last = saved.step
        return as_state(arrays, abstract_state), saved.extra

    def open(self, step: int | None = None) -> SavedStep | None:
        """The newest whole step (or `step`), to read parts of it; None if there is none.

        Raises CheckpointError for a damaged step, naming the files.
        """
        self.wait()
        step = self._verify_step(step)
        if step is None:
            return None
        meta = self._steps.read_meta(step)
        self._steps.check_number(step, meta)
        return SavedStep(self._steps.path(step), meta)

    def all_steps(self) -> tuple[int, ...]:
        """Whole steps, ascending, without the one that is being saved."""
        return self._steps.whole()

    def latest_step(self) -> int | None:
        """The newest whole step."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The whole step that is best by best_metric; None if none of them has the metric."""
        return max((step for step, keep in self._rank(self._best) if keep), default=None)

    def wait(self) -> None:
        """Blocks until the last save is whole. Raises CheckpointError if it failed."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:  # any error of the background thread; none is swallowed
            self._last, self._failed = None, True
            self._threads.end()
            # Not after `_sync`: the others may wait within Orbax for this process, for 20 minutes.
            raise self._not_saved(step, error) from error
        _sync("checkpoint_whole")

    def close(self) -> None:
        """Waits as `wait` does, and releases the threads. Raises CheckpointError if the last save failed."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            with contextlib.suppress(Exception) if self._failed else contextlib.nullcontext():
                self._orbax.close()  # it raises the error again that has been reported

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, Preempted) or jax.process_count() == 1:
            self.close()
        elif self._pending is not None:
            # The other processes do not know of this error, and do not wait here for each other as `wait` does.
            with contextlib.suppress(Exception):  # the error that is under way came first
                self._pending[1].result(UNSHARED_SECONDS)

    def _drop_error(self) -> None:
        """After a failed save, which was reported: Orbax's object raises its error again, so another takes over."""
        if self._failed:
            with contextlib.suppress(Exception):
                self._orbax.close()
            self._orbax, self._failed = _async_checkpointer(), False

    def _not_saved(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"step {step} was not saved to {self.folder}: {self._steps.why(error)}. "
            f"{self._steps.mend}; {self._whole()}. Then run the same command again."
        )

    def _whole(self) -> str:
        try:
            newest = self.latest_step()
        except CheckpointError:  # the bucket, which refused the step
            return "which steps are whole cannot be seen now"
        return "no earlier step is whole" if newest is None else f"step {newest} is whole and can be resumed from"

    def _finish(self, save: _Save) -> None:
        self._orbax.wait_until_finished()  # with several processes a barrier: all have written
        if not is_primary():
            self._steps.flush(save.step, save.number)
            help_with(f"saved/{save.number}", self.folder)
            self._metrics[save.step] = save.metrics
            return
        with SharedSums(f"saved/{save.number}", self.folder) as shared:
            self._steps.flush(save.step, save.number)
            for path in self._logs:
                with contextlib.suppress(OSError):  # a log that is absent, or fails, makes the step no less whole
                    flush(path)
            if save.expected:
                read_back.compare(save.path / "state", save.expected)
                self._read_back = True
            self._steps.publish(save.step, save.number, shared.sums)
        self._metrics[save.step] = save.metrics
        outdated = {s for s, keep in self._rank(self._newest) if not keep}
        outdated -= {s for s, keep in self._rank(self._best) if keep}
        for old in sorted(outdated):
            self._steps.remove(old)

    def _rank(self, policy: policies.PreservationPolicy | None) -> list[tuple[int, bool]]:
        by_metric = policy is self._best
        if policy is None:
            return []
        steps = [_Step(step, self._ranking_metrics(step)) for step in self.all_steps()]
        if by_metric:
            steps = [s for s in steps if s.metrics is not None]  # BestN keeps a lone step even without metrics
        kept = policy.should_preserve(steps, context=policies.PreservationContext())
        return [(s.step, keep) for s, keep in zip(steps, kept, strict=True)]

    def _ranking_metrics(self, step: int) -> Mapping[str, float] | None:
        metrics = self._metrics.get(step) or {}
        value = metrics.get(self._best_metric, math.nan)
        return None if math.isnan(value) or step <= self._ranked_after else metrics  # NaN cannot be ranked

    def _verify_step(self, step: int | None) -> int | None:
        # Process 0 chooses and verifies; the others follow, so that none restores a step that another refuses.
        problem, chosen = None, -1
        key = f"verified/{next(_verifications)}"
        if is_primary():
            try:
                with SharedSums(key, self.folder) as shared:
                    chosen = self._check_step(step, shared.sums)
            except CheckpointError as error:
                problem = error
        else:
            help_with(key, self.folder)
        if jax.process_count() > 1:
            verdict = np.array([chosen, problem is not None], np.int64)
            chosen, damaged = (int(x) for x in ocp.multihost.broadcast_one_to_all(verdict))
            if damaged and problem is None:
                problem = CheckpointError(f"process 0 refused the checkpoint in {self.folder}; its message says why")
        if problem is not None:
            raise problem
        return None if chosen < 0 else chosen

    def _check_step(self, step: int | None, summing: manifest.Summing) -> int:
        steps = self.all_steps()
        if step is None:
            if not steps:
                return -1
            step = steps[-1]
        if step not in steps:
            raise CheckpointError(f"{self.folder} has no whole step {step}; it has {list(steps) or 'none'}")
        try:
            self._steps.verify(step, summing)
        except manifest.StrayFiles:  # the step itself is whole
            raise
        except CheckpointError as error:
            earlier = [s for s in steps if s < step]
            back = f"go back to step {earlier[-1]}" if earlier else "start anew: there is no earlier step"
            raise CheckpointError(f"{error}\nDelete the folder {self.folder}/{step} to {back}.") from error
        return step


def _async_checkpointer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        ocp.multihost.sync_global_processes(name)
