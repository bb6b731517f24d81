"""The argument that every shipped config understands: `configs/NAME.py:smoke`."""

from collections.abc import Mapping
from typing import Any

from jaxft.assets import ASSETS
from jaxft.config.data import COLUMNS, DataConfig
from jaxft.config.method import MethodConfig
from jaxft.config.reading.python_file import ConfigDict, default_config, mixture_set
from jaxft.errors import ConfigError, did_you_mean


def with_arg(config: ConfigDict, arg: str | None) -> ConfigDict:
    """The unchanged config if there is no argument; for `smoke`, a run of seconds on any machine.

    A smoke run keeps the method (adapter, optimizer, packing, cadence) and replaces all that is expensive: it has a
    random two-layer model with a byte tokenizer, 24 rows and 4 steps. The rows have the form that the method trains on,
    its section's ROWS: conversations of the quickstart, or preferences and prompts that were made of them. It shows
    that every part of the run works, from data to report, and not that the model learns. Raises ConfigError for another
    argument.
    """
    if not arg:
        return config
    if arg != "smoke":
        raise ConfigError(f"config argument {arg!r} is not known.{did_you_mean(arg, ['smoke'])} Known: smoke.")
    with config.unlocked():
        config.output_dir = config.output_dir.rstrip("/") + "-smoke"
    config.model.update(path=str(ASSETS / "smoke"), revision=None, random_init=True, dtype="float32")
    config.model.param_dtype = "float32"
    config.adapter.r = min(config.adapter.r, 8)
    if config.method.distill.teacher is not None:
        config.method.distill.update(teacher=str(ASSETS / "smoke"), teacher_revision=None, teacher_random_init=True)
    train, held_out = _rows(config.method.name)
    for name in config.data.mixture:
        columns = dict.fromkeys(COLUMNS)
        limit = 24 // len(config.data.mixture)
        config.data.mixture[name].update(path=train, split=None, limit=limit, max_epochs=None, **columns)
    config.data.update(
        train="" if config.data.mixture else train, eval=held_out, eval_fraction=None, limit=24, eval_limit=4,
        chat_template=None, template_date=None, max_length=512, truncation="drop",
        **{column: getattr(DataConfig, column) for column in COLUMNS},
    )  # fmt: skip
    config.data.chat_template_kwargs = {}  # `update` would keep the keys that are there
    config.train.update(batch_size=8, steps=4, log_every=1)
    # The tiny model has no experts.
    config.router.update(load_balancing=None, z_loss=0.0)
    config.mesh.update(auto=False, slice=1, data=1, fsdp=-1, expert=1, context=1, tensor=1)
    config.train.accumulation_steps = 2 if config.train.accumulation_steps > 1 else 1
    config.optim.update(warmup_steps=None, warmup_ratio=None)
    if config.train.eval_every is not None:
        config.train.eval_every = 2
    if config.checkpoint.every is not None:
        config.checkpoint.every = 2
    if _form(config.method.name) == "prompts":
        config.rollout.update(num_generations=min(config.rollout.num_generations, 4), max_completion_length=16)
    config.eval.update(limit=4, max_new_tokens=8, batch_size=4)
    if config.eval.pattern is not None:
        config.eval.pattern = "(.+)"  # of any answer, since the rows are others
    return config


def smoke_values(values: Mapping[str, Any], arg: str) -> dict[str, Any]:
    """The values of a config that is no Python file, changed by the argument that every shipped config understands."""
    config = default_config()
    with config.unlocked():
        config.update({**values, "data": {**values["data"], "mixture": {}}})
        for name, fields in values["data"]["mixture"].items():
            config.data.mixture[name] = mixture_set(**fields)
    return with_arg(config, arg).to_dict()


def _form(method: str) -> str:
    """The form of the rows of a method."""
    return getattr(getattr(MethodConfig(), method, None), "ROWS", "conversations")


def _rows(method: str) -> tuple[str, str]:
    """Paths of the training and held-out rows for a method; an unknown name is refused when the config is resolved."""
    form = _form(method)
    if form == "conversations":
        return str(ASSETS / "quickstart" / "train.jsonl"), str(ASSETS / "quickstart" / "heldout.jsonl")
    return str(ASSETS / "smoke" / f"{form}.jsonl"), str(ASSETS / "smoke" / f"{form}_heldout.jsonl")
