"""Writes docs/configuration.md from the dataclasses of jaxft/config.py: `python docs/make_configuration.py`.

A field's meaning is the comment beside it in config.py, or the entry of MEANINGS here; permitted values
come from the tuples that config_checks.py checks against. A field without a meaning is an error, and so is a
meaning without a field.
"""

import ast
import dataclasses
import inspect
import io
import tokenize
import typing
from pathlib import Path

from jaxft import config, config_checks

TARGET = Path(__file__).with_name("configuration.md")

MEANINGS = {
    "output_dir": "the run folder",
    "seed": "of adapters, drawn weights, shuffling, dropout and `data.eval_fraction`",
    "adapter.kind": "`none` trains the model itself",
    "model.remat": "what the backward pass computes again: nothing; every layer; all but what attention gave; all but "
    "the results of matrix products; every layer, with what enters it kept in the host's memory",
    "adapter.r": "rank; at most the smaller side of every layer it is put on",
    "adapter.alpha": "numerator of the scale: `alpha / r`",
    "adapter.dropout": "share of the adapter's inputs that is dropped in training; at least 0, below 1",
    "adapter.init_lora_weights": "how A and B begin: `default`, `gaussian`, `pissa`, `pissa_niter_N`, `olora`, "
    "`loftq`, `loftq_niter_N`, `eva` or `eva_niter_N`; see [adapters](adapters.md)",
    "adapter.feedforward_modules": "`ia3`: layers whose inputs are scaled, not outputs; names as in `target_modules`",
    "adapter.target_modules": "`all-linear` (all but the LM head), or names, comma separated: `q_proj,v_proj`",
    "data.mixture": "several training sets in place of `train`, each under a name; see [mixtures](mixtures.md)",
    "data.stages": "`0.7: general, domain=2; 0.3: domain`: shares of the steps, and the sets that take part; None: all "
    "sets all the time",
    "data.turns": "which answers of a row share a sequence: those that read there as when they were given; all, or the "
    "run is refused; none; see [formats](formats.md#which-tokens-are-trained)",
    "data.reasoning": "thoughts as the row has them; written into the content as `<think>`; left out",
    "data.omissions": "where the chat template leaves out a part of a row: refuse, or warn and train on what it shows",
    "data.mixture.NAME.split": "part of a set that has parts",
    "data.mixture.NAME.format": "as `data.format`",
    "data.mixture.NAME.prompt_field": "as `data.prompt_field`",
    "data.mixture.NAME.completion_field": "as `data.completion_field`",
    "data.mixture.NAME.text_field": "as `data.text_field`",
    "data.mixture.NAME.train_on": "as `data.train_on`",
    "data.train_split": "which part of a set that has parts (datasets, tfds)",
    "data.prompt_field": "column of the prompts of a prompt/completion set",
    "data.eval": "held-out rows, in the same forms as `train`",
    "data.eval_limit": "use only the first rows of the held-out set",
    "data.format": "`auto` goes by the keys of each row; see [formats](formats.md)",
    "data.completion_field": "column of its completions",
    "data.text_field": "column of a plain-text set",
    "data.eval_split": "the same for `eval`",
    "data.packing": "several rows share a sequence, apart from each other; no row is ever split",
    "data.shuffle": "a new order of sequences in every epoch, from `seed`",
    "optim.name": "see [optimizers](optimizers.md), with what each keeps and its usual settings",
    "optim.learning_rate": "the peak, reached at the end of warm-up",
    "optim.schedule": "what follows warm-up",
    "optim.warmup_ratio": "share of the steps of the run",
    "optim.b1": "decay of the first moment; of schedule_free_adamw, the weight of the average. Here and below, None is "
    "the optimizer's usual value",
    "optim.b2": "decay of the second moment; of lion, of its only one",
    "optim.eps": "added to the root of the second moment",
    "optim.momentum": "of sgd and muon",
    "optim.rank": "of apollo's projections",
    "optim.scale_parameter": "of adafactor: updates are multiplied by the root mean square of their parameter",
    "optim.loraplus_lr_ratio": "learning rate of LoRA's B, and of vectors beside it, against that of A: LoRA+, "
    "arXiv:2402.12354",
    "optim.layer_decay": "learning rate of each layer against that of the one above; head and last norm have the full "
    "one, embeddings the least",
    "train.loss_type": "of a target: -log p, or that times p, which takes no gradient (dft, arXiv:2508.05629)",
    "train.label_smoothing_factor": "share of a target's weight that is spread over the whole vocabulary",
    "train.z_loss": "coefficient of log(Z)^2, Z being the softmax's normaliser; PaLM (arXiv:2204.02311) has 1e-4",
    "train.neftune_noise_alpha": "size of the noise on embedded tokens while training, 5 to 15 in arXiv:2310.05914",
    "train.ema_decay": "keep an exponential moving average of the trained weights, which is evaluated and exported in "
    "their place",
    "optim.clip_norm": "largest global norm of the gradient; None: no clipping",
    "train.accumulation_steps": "cut each step's batch into so many parts, one after another; the result is the same",
    "train.epochs": "passes over the training sequences; may be a fraction",
    "train.log_every": "steps between logged figures",
    "data.truncation": "rows longer than max_length: refuse to start, drop them, cut their right end",
    "data.train_on": "every assistant turn, the last assistant turn, or all tokens",
    "checkpoint.best_metric": "a held-out figure such as `eval_loss`: the best checkpoint by it is kept as well",
    "checkpoint.best_mode": "whether the best is the smallest or the largest",
    "mesh.data": "devices that hold the same parameters and compute other rows",
    "mesh.fsdp": "devices among which parameters, moments and rows are divided",
    "mesh.expert": "devices among which the experts and the rows are divided; must divide the number of experts",
    "eval.metric": "None: held-out loss only; the metrics are described in [formats](formats.md#scores)",
    "eval.limit": "generate for only the first held-out rows",
    "eval.max_new_tokens": "where an answer is broken off",
    "eval.batch_size": "answers that are generated side by side",
}

CHOICES = {
    "model.dtype": config_checks.DTYPES,
    "model.param_dtype": config_checks.DTYPES,
    "model.remat": config_checks.REMAT_POLICIES,
    "adapter.kind": config_checks.ADAPTERS,
    "data.format": config_checks.FORMATS,
    "data.train_on": config_checks.TRAIN_ON,
    "data.truncation": config_checks.TRUNCATION,
    "data.turns": config_checks.TURNS,
    "data.reasoning": config_checks.REASONING,
    "data.omissions": config_checks.OMISSIONS,
    "optim.name": config_checks.OPTIMIZERS,
    "optim.schedule": config_checks.SCHEDULES,
    "train.loss_type": config_checks.LOSS_TYPES,
    "checkpoint.best_mode": ("min", "max"),
    "eval.metric": config_checks.METRICS,
}

HEAD = """\
# Configuration

<!-- Written by docs/make_configuration.py from jaxft/config.py; do not edit. -->

A config file is Python: `get_config(arg)` fills the defaults below and returns them. Any field can be set from the
command line by the name that stands here:

    jaxft train --config=configs/quickstart.py --config.train.batch_size=8 --config.data.eval=None

`None` empties a field whose type permits it. Every config in `configs/` also takes the argument `:smoke`
(`--config=configs/quickstart.py:smoke`), which keeps the method and shrinks the rest to seconds: a random two-layer
model, 24 rows, 4 steps, `output_dir` with `-smoke` at its end.

An unknown name, a wrong type and an impossible combination are refused before anything is loaded, with the nearest
name that exists. The resolved config is written to `config.json` in the run folder.
"""


def comments(cls: type) -> dict[str, str]:
    """The comment that stands beside each field of a dataclass in its source."""
    source = inspect.getsource(cls)
    lines = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = typing.cast(ast.ClassDef, ast.parse(source).body[0]).body
    fields = [node for node in body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {node.target.id: lines[node.end_lineno] for node in fields if node.end_lineno in lines}


def rows(cls: type, prefix: str) -> list[str]:
    """A line of the table for every plain field. Raises SystemExit where one has no meaning."""
    hints, beside, lines = typing.get_type_hints(cls), comments(cls), []
    for spec in dataclasses.fields(cls):
        key = prefix + spec.name
        if dataclasses.is_dataclass(hints[spec.name]):
            continue
        meaning = MEANINGS.get(key) or beside.get(spec.name)
        if meaning is None:
            raise SystemExit(f"{key} has no meaning: write a comment beside it in jaxft/config.py")
        kind = getattr(hints[spec.name], "__name__", None) or str(hints[spec.name])
        kind = "sections" if config.named(hints[spec.name]) else kind.replace(" | ", " or ")
        if key in CHOICES:
            kind = kind.replace("str", ", ".join(f"`{value}`" for value in CHOICES[key]))
        default = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()
        lines.append(f"| `{key}` | {kind} | `{default!r}` | {meaning} |")
    return lines


def page() -> str:
    """The text of configuration.md."""
    sections = {name: kind for name, kind in typing.get_type_hints(config.RunConfig).items()}
    sections = {name: kind for name, kind in sections.items() if dataclasses.is_dataclass(kind)}
    for name, kind in tuple(sections.items()):
        free = {field: config.named(of) for field, of in typing.get_type_hints(kind).items() if config.named(of)}
        sections |= {f"{name}.{field}.NAME": of for field, of in free.items()}
    keys = {spec.name for spec in dataclasses.fields(config.RunConfig)}
    keys |= {f"{name}.{spec.name}" for name, kind in sections.items() for spec in dataclasses.fields(kind)}
    stale = sorted((MEANINGS.keys() | CHOICES.keys()) - keys)
    if stale:
        raise SystemExit(f"docs/make_configuration.py describes fields that do not exist: {', '.join(stale)}")
    parts = [HEAD]
    for name, cls, prefix in [("The run", config.RunConfig, ""), *((n, k, f"{n}.") for n, k in sections.items())]:
        about = inspect.getdoc(cls) or ""
        table = ["| field | takes | default | meaning |", "|---|---|---|---|", *rows(cls, prefix)]
        parts.append(f"\n## {name}\n\n{about}\n\n" + "\n".join(table) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")
