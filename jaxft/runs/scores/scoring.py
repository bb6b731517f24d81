"""Scores by generation on held-out rows, with samples."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxft.config import EvalConfig, RunConfig
from jaxft.data import Prepared, Tokenizer
from jaxft.errors import DataError
from jaxft.evaluation.metrics import Measured
from jaxft.files.run_folder import SCORES, read_if_whole
from jaxft.nn.decoder import Decoder
from jaxft.runs.scores.answers import AnswersFile, answer_prompts, answers_key
from jaxft.runs.scores.measuring import TRIED, Metrics

SAMPLES = 6

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answers:
    """Answers to the held-out prompts: by each metric, the first being the main one, and as text."""

    measured: tuple[Measured, ...]
    texts: tuple[str, ...]

    @property
    def score(self) -> Measured:
        """The main metric of the answers."""
        return self.measured[0]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Where answers are kept while they are made. way: `base` or `tuned`. model: as for `answers_key`."""

    file: AnswersFile
    way: str
    model: int | None = None


def answer(
    module: Decoder,
    tokenizer: Tokenizer,
    data: Prepared,
    config: EvalConfig,
    between: Callable[[], None] = lambda: None,
    *,
    kept: Kept | None = None,
) -> Answers:
    """Greedy answers to the held-out prompts, scored by the metrics of the config without their thoughts.

    between: called now and then; it may raise, to stop there. kept: the file from which it goes on then.
    """
    settings: Any = {"max_new_tokens": config.max_new_tokens, "slots": config.batch_size, "between": between}
    prompts, metrics = data.eval_prompts, Metrics.of(config)
    if kept is not None:
        key = answers_key(prompts, config.max_new_tokens, kept.model)
        write = partial(kept.file.write, kept.way, key, names=data.eval_names)
        settings |= {"kept": kept.file.kept(kept.way, key), "save": write}
    rows = answer_prompts(module, tokenizer, prompts, **settings)
    texts = tuple(row.text for row in rows)
    measured = tuple(metrics.measure([tokenizer.decode(one) for one in prompts], texts, data.eval_references))
    if kept is not None:
        write(rows, scores={one.name: one.per_row for one in measured})
    return Answers(measured, texts)


def check_scores(config: RunConfig, data: Prepared, tokenizer: Tokenizer, model: Decoder | None = None) -> list[str]:
    """What is to be said about scores by generation before the model answers; nothing if there are none.

    model: the model that will answer, which may be abstract. Raises DataError for references that the metric cannot
    score, and for prompts that leave no room for `eval.max_new_tokens` among the model's positions.
    """
    if config.eval.metric is None or data.eval_examples is None:
        return []
    metrics = Metrics.of(config.eval)
    first = [tokenizer.decode(one) for one in data.eval_prompts[:TRIED]]
    metrics.check(data.eval_references, data.eval_names, first)
    most = config.eval.max_new_tokens
    if model is not None:
        room = model.config.max_position_embeddings - model.virtual_tokens - max(map(len, data.eval_prompts), default=0)
        if room < most:
            raise DataError(
                f"the longest of {len(data.eval_prompts):,} held-out prompts leaves room for {room:,} tokens among the "
                f"model's {model.config.max_position_embeddings:,} positions, and eval.max_new_tokens={most}. "
                + (f"Set it to at most {room}, or remove" if room > 0 else "Remove")
                + " the long rows from the held-out set (data.truncation='drop' leaves out those beyond "
                "data.max_length)."
            )
    if not {*config.eval.metrics} - {"json_valid", "json_schema"}:  # another valid answer may be shorter
        return []
    lengths = [len(ids) for ids in tokenizer.encode_batch([text.strip() for text in data.eval_references])]
    long = sum(length > most for length in lengths)
    if not long:
        return []
    count = "all" if long == len(lengths) else f"{long:,} of"
    return [
        f"{count} {len(lengths):,} held-out answers are longer than eval.max_new_tokens={most}: what the model answers "
        f"is cut off there, so they can never be right. Set eval.max_new_tokens={max(lengths) + 1}."
    ]


def scores_of(folder: Path) -> dict[str, Any]:
    """What scores.json of a run folder says. Empty if there is no such file, and, with a warning, if it is damaged."""
    scores = read_if_whole(folder / SCORES)
    values = [scores[name] for name in ("base", "tuned") if name in scores]
    answers = scores.get("base_answers", [])
    if not (
        all(isinstance(one, dict) and isinstance(one.get("total"), int) and "value" in one for one in values)
        and isinstance(answers, list)
        and all(isinstance(text, str) for text in answers)
    ):
        log.warning("%s is damaged: values in it have wrong types, so it is left out", folder / SCORES)
        return {}
    return scores


def scores_key(data: Prepared, config: EvalConfig) -> str:
    """A digest of all that scores depend on beside the model: the held-out prompts and the settings."""
    request = [data.eval_prompts, data.eval_references, Metrics.of(config).content(), config.max_new_tokens]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


def score_summary(answers: Answers) -> dict[str, Any]:
    """The entry of one set of answers in scores.json and --json: of the main metric, and of the others in `metrics`."""
    others = {one.name: one.summary() for one in answers.measured[1:]}
    return answers.score.summary() | ({"metrics": others} if others else {})


def samples(tokenizer: Tokenizer, data: Prepared, base: Sequence[str], tuned: Answers) -> list[dict[str, Any]]:
    """A few prompts with the reference and the answers before and after training, right and wrong ones.

    By a metric that is a number, those with the best and the worst answers, and `correct` is None.
    """
    values, passes = tuned.score.values, tuned.score.passes
    order = sorted(range(len(values)), key=lambda i: values[i])
    wrong = [i for i in order if not (passes and values[i])][: SAMPLES // 2]
    right = [i for i in order if values[i]] if passes else order[len(wrong) :][::-1]
    right = right[: SAMPLES - len(wrong)]
    return [
        {
            "prompt": tokenizer.decode(data.eval_prompts[i]),
            "reference": data.eval_references[i],
            "base": base[i] if i < len(base) else "",
            "tuned": tuned.texts[i],
            "correct": bool(values[i]) if passes else None,
        }
        for i in right + wrong
    ]
