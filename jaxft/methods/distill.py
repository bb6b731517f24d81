"""Distillation: the model learns the distributions of a larger one, its teacher, over the next token."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.config import RunConfig
from jaxft.data import Prepared, Tokenizer, prepare
from jaxft.data.batch import Batch
from jaxft.errors import ConfigError
from jaxft.methods.method import Feed, Method, Run, no_state
from jaxft.methods.online.own_answers import OwnAnswersFeed, check_room
from jaxft.methods.parts import sequences
from jaxft.methods.parts.charts import TEACHER_CHARTS
from jaxft.methods.parts.router import router_coefficients
from jaxft.methods.teacher.cache import TEACHER_IDS, TEACHER_LOGPS, with_teacher_logps
from jaxft.methods.teacher.frozen import FrozenModel
from jaxft.nn.decoder import Decoder
from jaxft.objectives.distill import as_teacher, distill_loss
from jaxft.objectives.loss import Loss, LossSums, MethodState
from jaxft.objectives.token_divergence import Divergence, Teacher, TopLogps
from jaxft.rollouts.size import RolloutSize


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError if no teacher is named, it cannot read the rows, or more tokens are cached than there are."""
    settings, adapter = config.method.distill, config.adapter
    if settings.teacher is None:
        raise ConfigError(
            "method.name='distill' learns from a teacher, but method.distill.teacher is None: set it to a Hugging Face "
            "folder, a GGUF file or hf://owner/name, with the vocabulary of model.path"
        )
    if adapter.virtual_tokens:
        raise ConfigError(
            f"adapter.kind={adapter.kind!r} puts virtual tokens into every row, which the teacher cannot read. Use "
            "adapter.kind='lora'."
        )
    if settings.lmbda and settings.cache_top_k is not None:
        raise ConfigError(
            f"method.distill.cache_top_k={settings.cache_top_k} computes the teacher on the answers of the rows before "
            f"the first step, but method.distill.lmbda={settings.lmbda} trains on answers that are sampled later: set "
            "one of them to its default"
        )
    if settings.lmbda and settings.sft_weight:
        raise ConfigError(
            f"method.distill.sft_weight={settings.sft_weight} would teach the model the tokens that it sampled itself, "
            f"because method.distill.lmbda={settings.lmbda}: set it to 0"
        )
    vocab = model.config.vocab_size
    if settings.cache_top_k is not None and settings.cache_top_k > vocab:
        raise ConfigError(
            f"method.distill.cache_top_k={settings.cache_top_k} is more than the {vocab:,} tokens of the vocabulary. "
            "Set it to 64, for example."
        )
    router_coefficients(config, model)


def prepare_rows(config: RunConfig, tokenizer: Tokenizer) -> Prepared:
    """`data.prepare`. Raises DataError if answers are sampled and do not fit into a sequence with their prompts."""
    data, settings = prepare(config, tokenizer), config.method.distill
    if settings.lmbda:
        check_room(data, config.data.max_length, settings.max_new_tokens)
    return data


def feed(run: Run, graphdef: nnx.GraphDef[Decoder]) -> Feed:
    """`Method.feed`: the rows, or in some steps the model's own answers to their prompts."""
    settings = run.config.method.distill
    if not settings.lmbda:
        return sequences.feed(run, graphdef)
    return OwnAnswersFeed(
        run,
        graphdef,
        share=settings.lmbda,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
    )


def teacher_of(config: RunConfig) -> FrozenModel:
    """The teacher of a run, whose settings `check` has accepted."""
    settings = config.method.distill
    return FrozenModel(
        setting="method.distill.teacher",
        path=str(settings.teacher),
        revision=settings.teacher_revision,
        # Another seed than the student's, which would draw the same weights for the same shapes.
        random_seed=config.seed + 1 if settings.teacher_random_init else None,
        dtype=config.model.dtype,
        quantization=settings.teacher_quantization,
        in_step=settings.cache_top_k is None,
    )


def precompute(run: Run, base: Callable[[], Decoder]) -> Run:
    """`Method.precompute`: the rows with the teacher's log-probabilities, if they are cached."""
    if run.config.method.distill.cache_top_k is None:
        return run
    return with_teacher_logps(run, teacher_of(run.config))


def batch_shapes(config: RunConfig) -> Batch[jax.ShapeDtypeStruct]:
    """The shapes of a `Batch`, with the cached log-probabilities if there are any."""
    batch, count = sequences.batch_shapes(config), config.method.distill.cache_top_k
    if count is None:
        return batch
    shape = batch.tokens_BS.shape
    arrays = {
        TEACHER_IDS: jax.ShapeDtypeStruct((*shape, count), jnp.int32),
        TEACHER_LOGPS: jax.ShapeDtypeStruct((*shape, count + 1), jnp.float32),
    }
    return batch._replace(arrays=arrays)


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`distill_loss` with the settings of `method.distill`, against the teacher or what is cached of it."""
    settings = config.method.distill
    divergence = Divergence(beta=settings.beta, temperature=settings.temperature, sft_weight=settings.sft_weight)
    router = router_coefficients(config, model)

    def distill(model: Decoder, batch: Batch[jax.Array], key: jax.Array | None, state: MethodState | None) -> LossSums:
        return distill_loss(model, _teacher(batch, state), batch, key, divergence=divergence, router=router)

    return distill


def _teacher(batch: Batch[jax.Array], state: MethodState | None) -> Teacher | TopLogps:
    if TEACHER_IDS in batch.arrays:
        return TopLogps(batch.arrays[TEACHER_IDS], batch.arrays[TEACHER_LOGPS])
    return as_teacher(cast(MethodState, state).rebuilt.model, batch)


def evaluator(run: Run, graphdef: nnx.GraphDef[Decoder]) -> sequences.Evaluator | None:
    """The held-out loss and its metrics."""
    return sequences.make_evaluator(run, graphdef, loss(run.config, run.model))


def size_of_rollouts(config: RunConfig) -> RolloutSize | None:
    """One answer to each row of a batch, in the share of the steps that sample; packed rows may hold more prompts."""
    own = config.method.distill
    if not own.lmbda:
        return None
    return RolloutSize(
        prompts=config.train.batch_size,
        group=1,
        max_completion_length=own.max_new_tokens,
        prompt_length=config.data.max_length - own.max_new_tokens,
        length=config.data.max_length,
        slots=config.eval.batch_size,
        slots_field="eval.batch_size",
        length_field="method.distill.max_new_tokens",
        updates=1 / own.lmbda,
    )


def describe(config: RunConfig) -> str:
    """The teacher and the divergence, in a few words."""
    settings = config.method.distill
    cached = "" if settings.cache_top_k is None else f", {settings.cache_top_k} cached log-probabilities of each token"
    own = f", {settings.lmbda:.0%} of the steps on answers of its own" if settings.lmbda else ""
    return f"distillation with beta={settings.beta:g} from {settings.teacher}{cached}{own}"


METHOD = Method(
    prepare=prepare_rows,
    source=sequences.source,
    feed=feed,
    batch_shapes=batch_shapes,
    check=check,
    initial_state=no_state,
    loss=loss,
    evaluator=evaluator,
    describe=describe,
    charts=TEACHER_CHARTS,
    frozen=teacher_of,
    precompute=precompute,
    rollout_size=size_of_rollouts,
)
