"""Fields as they are declared: choices, meanings, dependencies, sections chosen by a name, and readers."""

import functools
import re

import pytest
from config_files import ROOT, with_fields

from jaxft.config import MethodConfig, RunConfig, choices, resolve
from jaxft.config.fields import Section, all_fields, own_fields

# What has to be set as well for a choice to be accepted.
COMPANIONS = {
    "optim.name": {"optim.schedule": "constant", "adapter.kind": "none"},
    "checkpoint.best_metric": {"data.eval_fraction": 0.1},
    "export.checkpoint": {
        "data.eval_fraction": 0.1,
        "checkpoint.best_metric": "eval_loss",
        "checkpoint.every": 2,
        "train.eval_every": 2,
    },
    "data.pairs": {"method.name": "dpo"},
    "rewards.completions": {"method.name": "grpo"},
}
# The first method that reports each held-out metric.
REPORTED_BY = {
    metric: name
    for name in reversed(choices(MethodConfig, "name"))
    for metric in getattr(MethodConfig(), name).HELD_OUT_METRICS
}


def test_every_choice_is_accepted():
    fields = [field for field in all_fields(RunConfig).values() if field.choices and "NAME" not in field.key]
    for field in fields:
        section, _, leaf = field.key.rpartition(".")
        chosen = {"optim.name": section.split(".")[1]} if section.startswith("optim.") else {}
        companions = COMPANIONS["optim.name"] | chosen if chosen else COMPANIONS.get(field.key, {})
        if section.startswith("method."):
            companions = companions | {"method.name": section.split(".")[1]}
        for value in field.choices:
            if value == "cispo":
                companions = companions | {"method.grpo.epsilon_high": 5.0}
            if value in REPORTED_BY:
                companions = companions | {"method.name": REPORTED_BY[value]}
            config = resolve(with_fields({**companions, field.key: value}))
            assert functools.reduce(getattr, section.split("."), config).__getattribute__(leaf) == value


def test_every_field_has_a_meaning_and_depends_on_fields_that_exist():
    fields = all_fields(RunConfig)
    for key, field in fields.items():
        assert field.meaning and "\n" not in field.meaning and "|" not in field.meaning, key
        for dependency in field.dependencies:
            assert dependency.key in fields, f"{key} is read by {dependency.key}"
            known = fields[dependency.key].choices
            assert set(dependency.values) <= set(known), f"{key} is read by {dependency.key}={dependency.values}"


@pytest.mark.parametrize("section", ["optim", "method"])
def test_a_section_is_chosen_by_its_name(section):
    fields = {field.key.removeprefix(f"{section}."): field for field in own_fields(type(getattr(RunConfig(), section)))}
    sections = [name for name, field in fields.items() if issubclass(field.base, Section)]
    assert fields["name"].chooses_section and list(fields["name"].choices) == sections
    for key, field in all_fields(type(getattr(RunConfig(), section)), f"{section}.").items():
        name = key.split(".")[1]
        if name in sections:
            assert (field.dependencies[0].key, field.dependencies[0].values) == (f"{section}.name", (name,))


def test_fields_that_may_change_when_a_run_is_resumed():
    free = [key for key, field in all_fields(RunConfig).items() if field.free_to_change]
    assert {key.split(".")[0] if key.startswith(("mesh.", "export.", "eval.")) else key for key in free} == {
        "output_dir", "model.remat", "mesh", "train.epochs", "train.steps", "train.log_every", "train.eval_every",
        "train.on_spike", "train.spike_threshold", "train.spike_window",
        "train.log_every_epochs", "train.report_to", "train.eval_every_epochs", "train.early_stopping_patience",
        "train.early_stopping_threshold", "checkpoint.keep", "checkpoint.every", "checkpoint.every_epochs",
        "checkpoint.best_metric", "checkpoint.best_mode", "export", "eval",
        "data.eval", "data.eval_split", "data.eval_limit", "data.num_proc", "data.cache",
        "rollout.slots", "rollout.log_completions",
        "rewards.workers", "rewards.timeout_seconds",
    }  # fmt: skip


def test_every_field_is_read_somewhere():
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "jaxft").rglob("*.py")
        if "config" not in path.relative_to(ROOT / "jaxft").parts
    )
    unread = {key for key in all_fields(RunConfig) if not re.search(rf"\.{key.rsplit('.')[-1]}\b", text)}
    # Read otherwise: `mesh` whole, by axis; lists and patterns of adapters through `targets`, `excluded` and `alphas`;
    # fields of a mixture's set through `DataConfig.of_set`; weights of losses through `DPOConfig.losses`.
    assert unread <= {
        "mesh.data", "mesh.fsdp", "mesh.slice", "mesh.context", "mesh.tensor", "mesh.expert", "adapter.target_modules",
        "adapter.exclude_modules", "adapter.layers_to_transform", "adapter.rank_pattern", "adapter.alpha_pattern",
        "adapter.modules_to_save", "adapter.num_virtual_tokens", "data.stages", "data.mixture.NAME.weight",
        "method.dpo.loss_weights",
    }  # fmt: skip
