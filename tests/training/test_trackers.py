"""Trackers: what they are told, that a resumed run goes on in theirs, and that they end nothing.

The libraries are replaced by modules that have the functions of theirs that are called; where they are installed, the
real ones record on this machine.
"""

import importlib
import importlib.util
import sys
import types

import pytest

from jaxft.config import with_overrides
from jaxft.errors import ConfigError, Preempted
from jaxft.training.log import RunLog
from jaxft.training.trackers import TRACKERS, Tracked, Trackers, require

RUN = Tracked(id="0123456789abcdef", name="my-run", values={"train.steps": 4, "digest.data.train": "ab"})
ROWS = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_loss": 1.8}]


class Wandb(types.ModuleType):
    """`wandb`: init, and a run with log, summary and finish."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.logged, self.summary, self.codes = [], [], {}, []

    def init(self, *, project, id, name, resume, config):
        assert resume == "allow"
        self.runs.append((project, id, name, config))
        return self

    def log(self, metrics, *, step):
        self.logged.append((step, metrics))

    def finish(self, exit_code):
        self.codes.append(exit_code)


class MLflow(types.ModuleType):
    """`mlflow`, with a server that keeps runs under ids of its own."""

    def __init__(self):
        super().__init__("mlflow")
        self.tags, self.params, self.logged, self.ended, self.active = {}, {}, [], [], None

    def set_experiment(self, name):
        return types.SimpleNamespace(experiment_id=f"experiment {name}")

    def search_runs(self, experiment_ids, filter_string, max_results, output_format):
        assert experiment_ids == ["experiment jaxft"] and output_format == "list" and max_results == 1
        same = [one for one, tags in self.tags.items() for k, v in tags.items() if filter_string == f"tags.{k} = '{v}'"]
        return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=one)) for one in same]

    def start_run(self, run_id=None, run_name=None, tags=None):
        assert (run_id is None) == (tags is not None)
        self.active = run_id or f"run {len(self.tags)}"
        self.tags.setdefault(self.active, tags)

    def log_params(self, params):
        assert len(params) <= 100 and not set(params) & set(self.params)
        self.params |= params

    def log_metrics(self, metrics, step):
        self.logged.append((self.active, step, metrics))

    def end_run(self, status):
        self.ended.append(status)


class Trackio(types.ModuleType):
    """`trackio`: module functions on the run that was begun last."""

    def __init__(self):
        super().__init__("trackio")
        self.runs, self.logged, self.ends = [], [], 0

    def init(self, *, project, name, resume, config):
        assert resume == "allow"
        self.runs.append((project, name, config))

    def log(self, metrics, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.ends += 1


@pytest.fixture
def libraries(monkeypatch):
    """The three libraries, by name."""
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    out = {"wandb": Wandb(), "mlflow": MLflow(), "trackio": Trackio()}
    for name, module in out.items():
        monkeypatch.setitem(sys.modules, name, module)
    return types.SimpleNamespace(**out)


def test_all_get_the_metrics_and_the_summary_and_go_on_in_the_same_run(libraries, tmp_path):
    def train(rows, resume_step):
        with Trackers(tuple(TRACKERS), RUN, pytest.fail) as trackers:
            with RunLog(tmp_path, total_steps=4, resume_step=resume_step, quiet=True, track=trackers.log) as log:
                for row in rows:
                    log.step(row["step"], {key: value for key, value in row.items() if key != "step"})
            trackers.summarize({"tuned_score": 0.5, "examples": 4, "metric": "exact_match"})

    train(ROWS, None)
    train([{"step": 3, "loss": 1.0}], 2)
    last = {"tuned_score": 0.5, "examples": 4.0}
    expected = [(1, {"loss": 2.0}), (2, {"loss": 1.5, "eval_loss": 1.8}), (3, {"loss": 1.0})]
    wandb, mlflow, trackio = libraries.wandb, libraries.mlflow, libraries.trackio
    assert wandb.runs == [("jaxft", RUN.id, "my-run", RUN.values)] * 2
    assert wandb.logged == expected and wandb.summary == last and wandb.codes == [0, 0]
    assert len(mlflow.tags) == 1 and mlflow.params == {"train.steps": "4", "digest.data.train": "ab"}
    assert [row[1:] for row in mlflow.logged] == [*expected[:2], (2, last), expected[2], (3, last)]
    assert mlflow.ended == ["FINISHED"] * 2
    assert trackio.runs == [("jaxft", "my-run-01234567", RUN.values)] * 2 and trackio.ends == 2
    assert trackio.logged == [*expected[:2], (2, last), expected[2], (3, last)]


def test_a_tracker_that_fails_is_told_of_and_ends_nothing(libraries, monkeypatch):
    told = []
    monkeypatch.setattr(libraries.wandb, "init", lambda **_: 1 / 0)
    monkeypatch.setattr(libraries.trackio, "log", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with Trackers(tuple(TRACKERS), RUN, told.append) as trackers:
        for step in range(1, 6):
            trackers.log({"step": step, "loss": 1.0})
    assert [line for line in told if "wandb" in line] == [
        "warning: wandb failed and the run goes on: ZeroDivisionError: division by zero"
    ]
    assert [line for line in told if "trackio" in line] == [
        "warning: trackio failed and the run goes on: OSError: disk full",
        "warning: trackio failed 3 times in a row and gets no more metrics",
    ]
    assert len(libraries.mlflow.logged) == 6 and libraries.mlflow.ended == ["FINISHED"]


@pytest.mark.parametrize(("error", "status"), [(ValueError("x"), "FAILED"), (Preempted(3), "FINISHED")])
def test_a_run_that_failed_is_marked_and_one_that_goes_on_later_is_not(libraries, error, status):
    with pytest.raises(type(error)), Trackers(("mlflow", "wandb"), RUN, pytest.fail):
        raise error
    assert libraries.mlflow.ended == [status] and libraries.wandb.codes == [int(status == "FAILED")]


def test_an_absent_library_is_refused_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r'needs the library wandb.*pip install "jaxft\[wandb\]"'):
        require(("wandb",))
    require(())


def test_names_of_trackers_are_a_list_in_any_form():
    base = {"model.path": "m", "data.train": "r"}
    for given in ("wandb,mlflow", "wandb, mlflow, wandb", ["wandb", "mlflow"]):
        assert with_overrides(base | {"train.report_to": given}).train.trackers == ("wandb", "mlflow")
    assert with_overrides(base).train.trackers == ()
    with pytest.raises(ConfigError, match="train.report_to='wandb,comet' is not one of wandb, mlflow"):
        with_overrides(base | {"train.report_to": "wandb,comet"})


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRACKERS))
def test_the_real_library_records_on_this_machine(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for first in (1, 3):  # begun, and resumed
        with Trackers((name,), RUN, pytest.fail) as trackers:
            for step in (first, first + 1):
                trackers.log({"step": step, "loss": 1.0 / step})
            trackers.summarize({"tuned_score": 0.5})
    if name == "mlflow":
        mlflow = importlib.import_module("mlflow")
        (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
        assert [(one.step, one.value) for one in history] == [(step, 1.0 / step) for step in (1, 2, 3, 4)]
        assert run.data.params["train.steps"] == "4" and run.data.metrics["tuned_score"] == 0.5
    elif name == "wandb":
        assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{RUN.id}"))) == 2
    else:
        assert list((tmp_path / "trackio").rglob("*.db"))
