"""The parts of `Method` that methods share whose answers are sampled and judged: data, checks and shapes."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext

import jax
import jax.numpy as jnp

from jaxft.config import RunConfig
from jaxft.config.data import CUTTING
from jaxft.data import Prepared, Tokenizer, tokenizer_of
from jaxft.data.batch import Batch
from jaxft.data.prompts import Prompt
from jaxft.errors import ConfigError, DataError
from jaxft.methods.online.reward_model import reward_model_of
from jaxft.methods.parts import sequences
from jaxft.nn.decoder import Decoder
from jaxft.rollouts.environments.conversation import rendering_of
from jaxft.rollouts.environments.environments import Environments
from jaxft.rollouts.environments.episode import REWARD
from jaxft.rollouts.environments.named import named_environment
from jaxft.rollouts.environments.template import TurnTemplate
from jaxft.rollouts.judged import REWARD_MODEL, shared_columns
from jaxft.rollouts.order import PromptOrder
from jaxft.rollouts.reward_documents import Reader
from jaxft.rollouts.reward_functions import RewardFunctions
from jaxft.rollouts.reward_functions.named import named_functions
from jaxft.rollouts.sample import row_of


def prompts_per_rollout(config: RunConfig) -> int:
    """The prompts that a rollout answers, each as often as a group has answers."""
    return config.train.batch_size * config.rollout.steps_per_rollout // config.rollout.num_generations


def source(config: RunConfig, data: Prepared, tokenizer: Tokenizer) -> PromptOrder:
    """The prompts of every rollout. Raises ConfigError for a mixture, which has no order of prompts."""
    if config.data.mixture:
        raise ConfigError(
            f"method.name={config.method.name!r} takes the prompts of one set, but data.mixture has several. Put them "
            "into one file, as often as they are to be answered, and set data.train to it."
        )
    return PromptOrder(
        prompts=[prompt for prompt in data.train_examples if isinstance(prompt, Prompt)],
        prompts_per_rollout=prompts_per_rollout(config),
        updates=config.rollout.updates,
        shuffle=config.data.shuffle,
        seed=config.seed,
        epochs=config.train.epochs,
        steps=config.train.steps,
    )


def check_online(config: RunConfig, model: Decoder, *, compares: bool = True) -> None:
    """Raises ConfigError for settings under which answers could not be sampled, judged or resumed.

    compares: whether the method learns from how the answers of a group differ, so that it needs at least two.
    """
    rollout, name = config.rollout, config.method.name
    if compares and rollout.num_generations < 2:
        raise ConfigError(
            f"rollout.num_generations={rollout.num_generations} must be at least 2: method.name={name!r} learns from "
            "how the answers to a prompt differ"
        )
    if config.rewards.functions is None and config.rewards.model is None and rollout.environment is None:
        raise ConfigError(
            f"method.name={name!r} learns from rewards, but rewards.functions is None: give functions such as "
            "rewards.py:exact, or a built-in one such as exact_match, a reward model (rewards.model), or set "
            "rollout.environment, which gives rewards itself"
        )
    if rollout.environment is not None:
        _check_environment(config)
    if config.train.batch_size % rollout.num_generations:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} counts the answers of an optimizer step, and must be a "
            f"multiple of rollout.num_generations={rollout.num_generations}, so that no step gets a part of a group"
        )
    check_lengths(config)
    every = config.checkpoint.every
    if every is not None and every % rollout.updates:
        raise ConfigError(
            f"checkpoint.every={every} would save in the middle of a rollout, from where a run cannot go on: make it a "
            f"multiple of rollout.steps_per_rollout x rollout.num_iterations = {rollout.updates}"
        )
    if config.checkpoint.every_epochs is not None and rollout.updates > 1:
        raise ConfigError(
            f"checkpoint.every_epochs={config.checkpoint.every_epochs} may save in the middle of a rollout, from where "
            f"a run cannot go on: set checkpoint.every to a multiple of {rollout.updates} steps instead"
        )
    if config.adapter.kind != "none" and config.adapter.dropout:
        raise ConfigError(
            f"adapter.dropout={config.adapter.dropout} would change the log-probabilities of answers after they were "
            "sampled without it. Set it to 0."
        )


def check_lengths(config: RunConfig) -> None:
    """Raises ConfigError if answers leave no room for prompts, or prompts would be cut."""
    rollout = config.rollout
    if rollout.max_completion_length >= config.data.max_length:
        raise ConfigError(
            f"rollout.max_completion_length={rollout.max_completion_length} leaves no room for prompts in "
            f"data.max_length={config.data.max_length}: lower the former or raise the latter"
        )
    if config.data.truncation in CUTTING:
        raise ConfigError(
            f"data.truncation={config.data.truncation!r} would cut prompts, which are then other questions: set it to "
            "'drop' or 'refuse'"
        )


def _check_environment(config: RunConfig) -> None:
    named_environment(config.rollout.environment or "")
    functions = config.rewards.functions
    if functions is not None and REWARD in [one.name for one in named_functions(functions)]:
        raise ConfigError(
            f"rewards.functions={functions!r} has a function called {REWARD!r}, which is the name of the reward that "
            "rollout.environment gives: rename the function"
        )


def rewards(config: RunConfig, data: Prepared) -> AbstractContextManager[RewardFunctions | None]:
    """`Method.rewards`: the functions of the config, imported and compared with the columns of all prompts.

    Raises ConfigError also if the reward model cannot render a prompt.
    """
    settings = config.rewards
    if settings.model is not None:
        check_readable(config, _prompts(data))
    if settings.functions is None:
        return nullcontext()
    functions = RewardFunctions(
        settings.functions,
        workers=settings.workers,
        timeout_seconds=settings.timeout_seconds,
        completions=settings.completions,
    )
    try:
        if settings.model is not None and REWARD_MODEL in (one.name for one in functions.functions):
            raise ConfigError(
                f"rewards.functions has a function called {REWARD_MODEL}, which is the name of rewards.model in "
                "metrics: rename the function"
            )
        functions.check(shared_columns(_prompts(data)))
    except BaseException:
        functions.close()
        raise
    return closing(functions)


def environments(
    config: RunConfig, data: Prepared, tokenizer: Tokenizer
) -> AbstractContextManager[Environments | None]:
    """`Method.environments`: the one of the config, imported, compared with the columns of all prompts, and reset once.

    Raises ConfigError too if the chat template cannot be continued from turn to turn; DataError if it refuses the first
    prompt.
    """
    if config.rollout.environment is None:
        return nullcontext()
    template = TurnTemplate(tokenizer)
    template.check()
    settings, prompts = config.rewards, _prompts(data)
    first = prompts[0]
    ours = Environments(config.rollout.environment, workers=settings.workers, timeout_seconds=settings.timeout_seconds)
    try:
        messages = ours.check(shared_columns(prompts), row_of(first), first.where)
        template.prompt(template.known(messages), **rendering_of(first))
    except DataError as error:
        ours.close()
        raise DataError(f"{first.where}: {error}") from error
    except BaseException:
        ours.close()
        raise
    return closing(ours)


def _prompts(data: Prepared) -> list[Prompt]:
    rows = [*data.train_examples, *(data.eval_examples or [])]
    return [prompt for prompt in rows if isinstance(prompt, Prompt)]


def check_readable(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Raises ConfigError, naming the row, if the run's reward model cannot read a prompt and its answer."""
    model = reward_model_of(config)
    if model is None:
        return
    reader = Reader(tokenizer_of(config), model.tokenizer())
    if config.rollout.environment is not None and not reader.reads_chats_as_sampled:
        raise ConfigError(
            f"rewards.model={config.rewards.model!r} has another tokenizer or chat template than model.path, "
            "so that it would read the text of answers alone, without what rollout.environment says between them. "
            "Give a reward model with the tokenizer and the template of model.path."
        )
    for prompt in prompts:
        reader.check(prompt)


def batch_shapes(config: RunConfig, values: Sequence[str], arrays: Sequence[str]) -> Batch[jax.ShapeDtypeStruct]:
    """The shapes of an update for `jaxft plan`, as if every answer filled a row. values, arrays: names."""
    batch = sequences.batch_shapes(config, values)
    of_tokens = jax.ShapeDtypeStruct(batch.tokens_BS.shape, jnp.float32)
    return batch._replace(arrays=dict.fromkeys(arrays, of_tokens))
