"""KTO: training on single answers that are labelled good or bad, against the model at the start of the run."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, NamedTuple

import jax
from flax import nnx

from jaxft.config import RunConfig
from jaxft.config.data import CUTTING
from jaxft.data import Prepared
from jaxft.data.batch import Array, Batch, Example
from jaxft.data.formats import DESIRABLE
from jaxft.data.preferences.labelled import Labelled, Reserved, prepare_labelled
from jaxft.errors import ConfigError
from jaxft.methods.method import Method, Run
from jaxft.methods.parts import sequences
from jaxft.methods.parts.charts import LABEL_CHARTS
from jaxft.methods.parts.reference import check_reference, is_cached, reference_logps, reference_state, reference_values
from jaxft.methods.parts.reference_cache import with_reference_logps
from jaxft.methods.parts.router import router_coefficients
from jaxft.nn.decoder import Decoder
from jaxft.objectives.documents import document_logps
from jaxft.objectives.kto import KTOSums, kto_loss, kto_sums, summed_log_ratio
from jaxft.objectives.loss import BatchSums, Loss, LossSums, MethodState


class KTOBatch(NamedTuple, Generic[Array]):
    """Two batches whose documents are in the same places.

    answers: the labelled answers, which are trained. mismatched: of each, its prompt with the answer to another one, by
    which the KL divergence is estimated; None if the loss does not estimate it.
    """

    answers: Batch[Array]
    mismatched: Batch[Array] | None


def check(config: RunConfig, model: Decoder) -> None:
    """Raises ConfigError for settings under which the reference would not be the base model, or rows would be cut."""
    check_reference(config)
    data = config.data
    if data.truncation in CUTTING:
        raise ConfigError(
            f"data.truncation={data.truncation!r} would cut answers, whose label is of the whole answer. Use "
            "'drop' or 'refuse', or raise data.max_length."
        )
    if data.train_on == "all":
        raise ConfigError("data.train_on='all' trains prompts too, which nobody labelled. Use 'assistant'.")
    router_coefficients(config, model)


def feed(run: Run, graphdef: nnx.GraphDef[Decoder]) -> sequences.SequenceFeed:
    """`Method.feed`: the answers of `run.source`, and their mismatched documents by the same plan."""
    if not _estimates_kl(run.config):
        answers = partial(sequences.device_batch, run)
        return sequences.SequenceFeed(source=run.source, batch=lambda step: KTOBatch(answers(step), None))
    sets = tuple(dataclasses.replace(one, examples=mismatched_of(one.examples)) for one in run.data.sets)
    data: Prepared = dataclasses.replace(run.data, sets=sets)
    source = sequences.source(run.config, data, run.tokenizer)

    def batch(step: int) -> KTOBatch[jax.Array]:
        return KTOBatch(sequences.device_batch(run, step), sequences.device_batch(run, step, source))

    return sequences.SequenceFeed(source=run.source, batch=batch)


def mismatched_of(examples: Sequence[Example]) -> list[Example]:
    """The mismatched documents of labelled examples, each in a place as large as that of its example."""
    return [_reserved(example.mismatched, len(example)) for example in examples if isinstance(example, Labelled)]


def batch_shapes(config: RunConfig) -> KTOBatch[jax.ShapeDtypeStruct]:
    """The shapes of a batch."""
    values = reference_values(config)
    mismatched = sequences.batch_shapes(config, values=values) if _estimates_kl(config) else None
    return KTOBatch(sequences.batch_shapes(config, values=(DESIRABLE, *values)), mismatched)


def precompute(run: Run, base: Callable[[], Decoder]) -> Run:
    """`Method.precompute`: the rows with the log-probabilities of the reference, if they are cached.

    They are those of the answers and of the mismatched documents.
    """

    def scored(examples: Sequence[Example]) -> list[Example]:
        return [*examples, *mismatched_of(examples)]

    def joined(examples: Sequence[Example], scored: list[Example]) -> list[Example]:
        answers, mismatched = scored[: len(examples)], scored[len(examples) :]
        if not mismatched:
            return answers
        labelled = [example for example in answers if isinstance(example, Labelled)]
        both = zip(labelled, mismatched, strict=True)
        return [dataclasses.replace(answer, mismatched=other.documents[0]) for answer, other in both]

    return with_reference_logps(run, base, document_logps, scored=scored, joined=joined)


def reference_passes(config: RunConfig) -> int:
    """`Method.reference_passes`: the reference on the answers, and both models on the mismatched documents."""
    live = 0 if is_cached(config) else 1
    return live + (1 + live) * _estimates_kl(config)


def batch_sums(config: RunConfig, model: Decoder) -> BatchSums:
    """The numbers of answers of either class, and the log-ratio of the mismatched documents."""

    def sums(model: Decoder, batch: KTOBatch[jax.Array], state: MethodState | None) -> KTOSums:
        if batch.mismatched is None:
            return kto_sums(batch.answers, None)
        reference_BP = reference_logps(model, batch.mismatched, state)
        return kto_sums(batch.answers, summed_log_ratio(model, batch.mismatched, reference_BP))

    return sums


def loss(config: RunConfig, model: Decoder) -> Loss:
    """`kto_loss` with the settings of `method.kto`, against the reference."""
    settings = config.method.kto
    compute = partial(
        kto_loss,
        beta=settings.beta,
        loss_type=settings.loss_type,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
        router=router_coefficients(config, model),
    )

    def kto(model: Decoder, batch: KTOBatch[jax.Array], key: jax.Array | None, state: MethodState | None) -> LossSums:
        if state is None or state.batch is None:
            raise ValueError("the loss needs the sums over the whole batch")
        return compute(model, reference_logps(model, batch.answers, state), batch.answers, key, state.batch)

    return kto


def evaluator(run: Run, graphdef: nnx.GraphDef[Decoder]) -> sequences.Evaluator | None:
    """The held-out loss and its metrics; the KL divergence is estimated once, over all held-out rows."""
    config, model, examples = run.config, run.model, run.data.eval_examples
    if examples is None:
        return None
    answers = sequences.held_out_batches(run, examples)
    mismatched = sequences.held_out_batches(run, mismatched_of(examples)) if _estimates_kl(config) else None

    def batch(number: int) -> KTOBatch[jax.Array]:
        return KTOBatch(answers.batch(number), None if mismatched is None else mismatched.batch(number))

    held_out = sequences.HeldOut(count=answers.count, batch=batch)
    return sequences.make_evaluator(run, graphdef, loss(config, model), batch_sums(config, model), held_out)


def describe(config: RunConfig) -> str:
    """The loss and its beta."""
    names = {"kto": "KTO", "apo_zero_unpaired": "APO-zero on single answers"}
    return f"{names[config.method.kto.loss_type]} with beta={config.method.kto.beta:g}"


def _estimates_kl(config: RunConfig) -> bool:
    return config.method.kto.loss_type == "kto"


def _reserved(example: Example, room: int) -> Reserved:
    own = {field.name: getattr(example, field.name) for field in dataclasses.fields(Example)}
    return Reserved(**own, room=room)


METHOD = Method(
    prepare=prepare_labelled,
    source=sequences.source,
    feed=feed,
    batch_shapes=batch_shapes,
    check=check,
    initial_state=reference_state,
    batch_sums=batch_sums,
    loss=loss,
    evaluator=evaluator,
    describe=describe,
    loss_unit="mean over answers",
    charts=LABEL_CHARTS,
    precompute=precompute,
    reference_passes=reference_passes,
)
