"""Rejection sampling: several answers to each prompt, of which the best become rows of a data file."""

# n answers to one prompt

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.checkpoint.load import LoadedModel, load_model
from jaxft.config import RunConfig
from jaxft.config.fields import field_values
from jaxft.config.rewards import RewardsConfig
from jaxft.data import Tokenizer
from jaxft.data.prompts import Prompt
from jaxft.errors import ConfigError, DataError, listed
from jaxft.files.atomic import unfinished_folder, write_text
from jaxft.files.targets import locked_output
from jaxft.home import local_path
from jaxft.methods import method_of
from jaxft.methods.online.reward_model import reward_model_of
from jaxft.methods.online.settings import check_lengths
from jaxft.nn.decoder import Decoder
from jaxft.rollouts.judged import ModelScores, judge
from jaxft.rollouts.reward_functions import RewardFunctions
from jaxft.rollouts.reward_functions.named import named_functions
from jaxft.rollouts.rollout import Rollout
from jaxft.rollouts.sample import Sampler, seed_of
from jaxft.rollouts.selection import Keep, Selection, answer_row, pair_row
from jaxft.rollouts.unfinished import Unfinished, as_line
from jaxft.runs.identity.contents import code_digest, rows_read
from jaxft.runs.rewards import answer_scores, check_head
from jaxft.trees import is_key

# Sections whose values make the answers and their rewards what they are.
DECISIVE = ("model.", "data.", "rollout.", "rewards.", "seed")


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What gives answers their rewards: functions, a reward model with its tokenizer, or both, whose rewards add up.

    settings: the weight of the reward model, and the penalty for answers that were cut off.
    """

    functions: RewardFunctions | None
    model: LoadedModel | None
    tokenizer: Tokenizer
    settings: RewardsConfig

    def rewards(self, rollouts: Sequence[Rollout]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(the rewards of answers, float64, NaN for those that nothing scored; the scores by what gave them)."""
        scores = None
        if self.model is not None:
            texts = [one.text for one in rollouts]
            names = [f"answer {one.number} to {one.prompt.where}" for one in rollouts]
            values = answer_scores(self.model, self.tokenizer, [one.prompt.messages for one in rollouts], texts, names)
            scores = ModelScores(values=values.astype(np.float64), weight=self.settings.model_weight, seconds=0.0)
        penalty = self.settings.missing_eos_penalty
        judged = judge(rollouts, self.functions, model=scores, missing_eos_penalty=penalty)
        return judged.rewards, judged.by_function


@dataclass
class Counts:
    """What a call has done, added up over prompts. cut: answers cut off at their length. tokens: sampled ones."""

    prompts: int = 0
    answers: int = 0
    tokens: int = 0
    cut: int = 0
    unscored: int = 0
    reward: float = 0.0
    kept: int = 0
    kept_tokens: int = 0
    prompts_kept: int = 0
    pairs: int = 0
    ties: int = 0

    def add(self, other: Mapping[str, float]) -> None:
        """Adds the counts of one prompt."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + other[field.name])

    def summary(self) -> dict[str, Any]:
        """The figures of a finished file. mean_reward is None if nothing was scored."""
        scored = self.answers - self.unscored
        return {
            "prompts": self.prompts,
            "answers": self.answers,
            "mean_reward": self.reward / scored if scored else None,
            "unscored": self.unscored,
            "cut_off": self.cut,
            "rows": self.kept,
            "prompts_with_a_row": self.prompts_kept / self.prompts,
            "tokens": self.tokens,
            "tokens_in_rows": self.kept_tokens,
            "pairs": self.pairs,
            "ties": self.ties,
        }


def sample(
    model: LoadedModel,
    tokenizer: Tokenizer,
    config: RunConfig,
    to: str,
    *,
    keep: Keep = "best",
    threshold: float | None = None,
    keep_cut: bool = False,
    pairs: str | None = None,
    reward_model: LoadedModel | None = None,
    reward_tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    print_line: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Draws `rollout.num_generations` answers to each training prompt of a config and writes the best to a file.

    config: of a method that learns from rewards; its `data` gives the prompts, `rollout` how answers are drawn, and
    `rewards` what judges them. reward_model: judges them in the place of `rewards.model`, with `rewards.model_weight`.
    reward_tokenizer: its own, by default that of the model. keep, threshold, keep_cut: see `Selection`.
    to: a new JSONL file of rows with `prompt`, `completion`, `reward`, `rewards` by name, and `row`, the number of the
    prompt; `jaxft train` reads it as it is. pairs: another one, of the best and the worst answer to each prompt as
    `chosen` and `rejected`, without ties. overwrite: whether finished files may be replaced.

    The rows are in the order of the prompts, and draws depend on the seed, the row and the place in the answer alone.
    Until the end they are in a file named like `to` with `.jaxft.partial` appended, from which the same call goes on
    after an interruption. Returns the figures of `Counts.summary`. Raises ConfigError for settings that cannot be
    sampled with, for finished files, and for an unfinished one of other settings; DataError as `prepare_prompts` does.
    """
    selection = Selection(keep=keep, threshold=threshold, keep_cut=keep_cut)
    to, pairs = local_path(to), None if pairs is None else local_path(pairs)
    _check(model, config, reward_model)
    check_outputs(to, pairs, overwrite=overwrite)
    data = method_of(config).prepare(config, tokenizer)
    prompts = [prompt for prompt in data.train_examples if isinstance(prompt, Prompt)]
    reward_model, own_tokenizer = _reward_model(config, reward_model, reward_tokenizer or tokenizer)
    settings = {
        "config": _values(config),
        "selection": [selection.keep, selection.threshold, selection.keep_cut],
        "pairs": pairs is not None,
        "prompts": rows_read(prompts)["digest"],
        "model": fingerprint(model.module),
        "reward_model": None if reward_model is None else fingerprint(reward_model.module),
    }
    with locked_output(to, "jaxft sample"), _functions(config, data) as functions:
        unfinished = Unfinished(unfinished_folder(to), settings)
        if done := unfinished.rows:
            print_line(f"going on after {done:,} of {len(prompts):,} prompts")
        judging = Judge(functions=functions, model=reward_model, tokenizer=own_tokenizer, settings=config.rewards)
        sampler = _sampler(config, tokenizer)
        for first in range(done, len(prompts), _prompts_at_once(config)):
            part = prompts[first : first + _prompts_at_once(config)]
            how: dict[str, Any] = {"temperature": config.rollout.temperature, "seed": seed_of(config.seed, 0)}
            rollouts = sampler.sample(model.module, part, first_group=first, **how)
            unfinished.add(_records(rollouts, judging, selection, len(part)))
            print_line(f"{first + len(part):,} of {len(prompts):,} prompts")
        return _finish(unfinished, to, pairs)


def fingerprint(module: Decoder) -> str:
    """A number that tells models apart: sums over their parameters, as text."""
    leaves = jax.tree.leaves(nnx.state(module))
    sums = [np.float64(jnp.sum(jnp.abs(leaf.astype(jnp.float32)))) for leaf in leaves if not is_key(leaf)]
    return hashlib.blake2b(np.array(sums).tobytes(), digest_size=8).hexdigest()


def _check(model: LoadedModel, config: RunConfig, reward_model: LoadedModel | None) -> None:
    if jax.process_count() > 1:
        raise ConfigError(
            f"this call is one of {jax.process_count()} processes, and sampling into a file is done by one: start it "
            "in one process, whose devices it uses all"
        )
    if config.method.chosen.ROWS != "prompts":
        raise ConfigError(
            f"method.name={config.method.name!r} does not sample answers, so its config says neither how they are "
            "drawn nor how they are judged. Set method.name='grpo', and the sections rollout and rewards."
        )
    if config.rollout.environment is not None:
        raise ConfigError(
            f"rollout.environment={config.rollout.environment!r} makes answers of several turns, and a row that is "
            "written has a prompt and one answer. Set it to None, and rewards.functions to what judges that answer."
        )
    if config.rewards.functions is None and config.rewards.model is None and reward_model is None:
        raise ConfigError(
            "nothing judges the answers: set rewards.functions, such as to rewards.py:exact, or give a reward model"
        )
    if reward_model is not None:
        check_head(reward_model)
    check_lengths(config)
    if model.module.virtual_tokens != config.adapter.virtual_tokens:
        raise ConfigError(
            f"the model begins with {model.module.virtual_tokens} virtual tokens, and the config's adapter with "
            f"{config.adapter.virtual_tokens}. Use the config of the run that trained the model."
        )


def check_outputs(to: str, pairs: str | None, *, overwrite: bool) -> None:
    """Raises ConfigError if the files of `sample` cannot be written, or are there and may not be replaced."""
    if pairs is not None and Path(pairs).absolute() == Path(to).absolute():
        raise ConfigError(f"rows and pairs cannot both be written to {to}: name another file for the pairs")
    existing = [path for path in (to, pairs) if path is not None and Path(path).exists()]
    if folders := [path for path in existing if Path(path).is_dir()]:
        raise ConfigError(f"{listed(folders)} is a folder, and a file is written: name a file in it")
    if existing and not overwrite:
        raise ConfigError(
            f"{listed(existing)} is there already. Choose another name, or set overwrite=True (--overwrite) to "
            "replace it."
        )
    for path in (to, pairs):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ConfigError(
                f"{Path(path).absolute().parent} is no folder, so {path} cannot be written: make it first"
            )


def _reward_model(
    config: RunConfig, given: LoadedModel | None, tokenizer: Tokenizer
) -> tuple[LoadedModel | None, Tokenizer]:
    """The reward model with its tokenizer: the given ones, or those of `rewards.model`."""
    named = reward_model_of(config)
    if given is not None or named is None:
        return given, tokenizer
    loaded = load_model(named.path, dtype=config.model.dtype)
    check_head(loaded)
    return loaded, named.tokenizer()


def _functions(config: RunConfig, data: Any) -> AbstractContextManager[RewardFunctions | None]:
    if config.rewards.functions is None:
        return nullcontext()
    return method_of(config).rewards(config, data)


def _sampler(config: RunConfig, tokenizer: Tokenizer) -> Sampler:
    return Sampler(
        tokenizer=tokenizer,
        group=config.rollout.num_generations,
        max_completion_length=config.rollout.max_completion_length,
        length=config.data.max_length,
        slots=config.rollout.slots,
    )


def _prompts_at_once(config: RunConfig) -> int:
    """Prompts between two writes: so many that few slots are idle while the last answers end."""
    return max(1, 4 * config.rollout.slots // config.rollout.num_generations)


def _records(rollouts: Sequence[Rollout], judging: Judge, selection: Selection, prompts: int) -> list[dict[str, Any]]:
    """What is written of each of the prompts: its rows, its pair, and what they add to `Counts`."""
    rewards, by_name = judging.rewards(rollouts)
    n = len(rollouts) // prompts
    return [
        _record(
            rollouts[start : start + n],
            rewards[start : start + n],
            {name: values[start : start + n] for name, values in by_name.items()},
            selection,
        )
        for start in range(0, len(rollouts), n)
    ]


def _record(
    own: Sequence[Rollout], rewards: np.ndarray, by_name: Mapping[str, np.ndarray], selection: Selection
) -> dict[str, Any]:
    prompt, scored = own[0].prompt, rewards[~np.isnan(rewards)]
    kept, pair = selection.kept(own, rewards), selection.pair(own, rewards)

    def numbers(index: int) -> dict[str, Any]:
        by = {name: _number(values[index]) for name, values in by_name.items()}
        return {"reward": _number(rewards[index]), "rewards": by, "row": prompt.row}

    counts = Counts(
        prompts=1,
        answers=len(own),
        tokens=sum(len(one.tokens) for one in own),
        cut=sum(one.finish_reason == "length" for one in own),
        unscored=len(own) - len(scored),
        reward=float(scored.sum()),
        kept=len(kept),
        kept_tokens=sum(len(own[index].tokens) for index in kept),
        prompts_kept=bool(kept),
        pairs=pair is not None,
        ties=pair is None,
    )
    out = {
        "rows": [answer_row(prompt, own[index], numbers(index)) for index in kept],
        "counts": {field.name: getattr(counts, field.name) for field in fields(counts)},
        "pair": None,
    }
    if pair is not None:
        best, worst = pair
        scores = {"score_chosen": float(rewards[best]), "score_rejected": float(rewards[worst]), "row": prompt.row}
        out["pair"] = pair_row(prompt, own[best], own[worst], scores)
    return out


def _finish(unfinished: Unfinished, to: str, pairs: str | None) -> dict[str, Any]:
    """Writes the files of a call whose prompts are all done, and returns its figures."""
    counts, rows, paired = Counts(), [], []
    for record in unfinished.records():
        counts.add(record["counts"])
        rows += [as_line(row) for row in record["rows"]]
        paired += [as_line(record["pair"])] if record["pair"] is not None else []
    if not rows:
        raise DataError(
            f"no answer was kept: of {counts.answers:,} answers {counts.cut:,} were cut off at "
            f"rollout.max_completion_length and {counts.unscored:,} had no reward; the mean reward is "
            f"{counts.summary()['mean_reward']}. Lower the threshold, let answers be longer, or keep those that were "
            f"cut off (keep_cut), and delete {unfinished.path}, which has what was drawn."
        )
    summary = {"file": str(to)} | counts.summary()
    if pairs is not None:
        write_text(pairs, "".join(paired))
        summary["pairs_file"] = str(pairs)
    write_text(to, "".join(rows))
    unfinished.path.unlink()
    return summary


def _values(config: RunConfig) -> dict[str, Any]:
    """The values that decide about answers and rewards, by key; of reward functions, their code."""
    named = [
        (field.key, value)
        for field, value in field_values(config)
        if not (field.free_to_change or field.by_content or field.sections)
    ]
    functions = config.rewards.functions
    code = {"rewards.functions": functions and code_digest(named_functions(functions))}
    return {key: value for key, value in named if key.startswith(DECISIVE)} | code


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
