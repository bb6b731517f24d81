"""`Session`: training by hand, in single calls: gradients, update, sampling, log-probabilities, state, export."""

# B rows of a batch, S sequence, n trained tokens of a row

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from jaxft.adapters.attach import adapters, virtual_modules
from jaxft.checkpoint.resume import RunCheckpoints
from jaxft.config import RunConfig
from jaxft.data import tokenizer_of
from jaxft.data.batch import Batch
from jaxft.data.prompts import Prompt, read_prompts
from jaxft.errors import ConfigError, DataError
from jaxft.files import run_folder
from jaxft.files.buckets.working_copy import checkpoints_of, folder_of
from jaxft.generation.text import Prompt as GivenPrompt
from jaxft.generation.text import as_prompts
from jaxft.hardware.attached import step_options
from jaxft.hardware.compile_cache import keep_compiled
from jaxft.methods.online.passes import rows_of
from jaxft.methods.parts.sequences import evaluated_weights
from jaxft.nn.virtual import virtual_ids
from jaxft.objectives.loss import Loss, LossSums, added
from jaxft.objectives.policy.loss import policy_logps
from jaxft.optim.make import make_schedule
from jaxft.rollouts.sample import Sampler, seed_of
from jaxft.runs.build import abstract_model, build_model, make_mesh, make_tx, start_state
from jaxft.runs.export import FORMATS, read_step, write
from jaxft.runs.folder import dated, refuse_other_base
from jaxft.runs.going_on import going_on
from jaxft.runs.identity.agreement import check_contents, check_settings
from jaxft.runs.identity.contents import reads_of
from jaxft.runs.memory.recomputation import take_policy
from jaxft.runs.rewards import GivenRows
from jaxft.runs.session.folders import SessionFolders, folder_of_state, new_export
from jaxft.runs.session.losses import SLOPES, check_session, linear_loss, loss_of
from jaxft.runs.session.rows import (
    Answer,
    Packed,
    Row,
    examples_of,
    pack_examples,
    plain,
    policy_rows,
    with_numbers,
)
from jaxft.runs.session.settings import config_of, course_of
from jaxft.sharding.arrays import from_rows, to_host
from jaxft.sharding.processes import is_multi_process, on_primary
from jaxft.training.state import TrainState, saved_part, with_saved
from jaxft.training.step import make_gradients, make_update

# (the log-probabilities of the trained tokens of each row, [n] each) -> (sum over units, number of units)
LossOfLogprobs = Callable[[list[jax.Array]], tuple[jax.Array | float, jax.Array | float]]


class Session:
    """A model that is trained by single calls, on the step, mesh, generation and checkpoints of `jaxft train`.

    model: a config, or a model path, for which `overrides` are settings as `jaxft.get_config` takes them, such as
    `{"adapter.r": 16}`. Of the config, `train.batch_size / train.accumulation_steps` sequences of `data.max_length` are
    computed at a time, whatever the number of rows; `optim.schedule` runs over `train.steps`, and without these the
    rate is constant after the warm-up. `rollout.temperature` divides the logits of the policy losses. With several
    processes, every one makes the same calls. Raises ConfigError for settings with which single calls cannot work.

    Attributes: config, tokenizer, mesh, step (updates so far).
    """

    def __init__(self, model: RunConfig | str, overrides: Mapping[str, Any] | None = None) -> None:
        config = config_of(model, overrides or {})
        check_settings(config)
        config = going_on(config)
        check_session(config)
        config, self.tokenizer = dated(config, tokenizer_of(config))
        if is_multi_process():
            check_contents(reads_of(config, self.tokenizer), self.tokenizer)
        self.config = config
        keep_compiled()
        self._model = abstract_model(config)
        self.mesh = make_mesh(config, self._model, jax.devices())
        self.mesh.check_batch(config.train.batch_size // config.train.accumulation_steps)
        self._schedule = make_schedule(*course_of(config))
        self._folders = SessionFolders()
        if config.model.random_init:  # the drawn weights are in the folder of the run
            self._open(folder_of(config.output_dir))
        self._loaded = build_model(config, self.mesh, random_base=folder_of(config.output_dir) / run_folder.BASE)
        take_policy(config, self._loaded.module, self._model, self.mesh)
        tx = make_tx(config, self._loaded.module, self._schedule)
        self._graphdef, self._state = start_state(config, self._loaded.module, tx, self.mesh)
        shardings = jax.tree.map(lambda x: x.sharding, self._state.trainable)
        self._zeros = jax.jit(partial(jax.tree.map, jnp.zeros_like), out_shardings=shardings)
        self._gradients: dict[str, Callable[..., tuple[Any, LossSums]]] = {}
        self._updates: dict[bool, Callable[..., tuple[TrainState, dict[str, jax.Array]]]] = {}
        self._logps: dict[float, Callable[..., jax.Array]] = {}
        self._draws = 0  # calls of `sample` that took their seed from the session
        self._forget()

    @property
    def step(self) -> int:
        """Updates so far."""
        return int(self._state.step)

    def forward_backward(
        self,
        rows: Sequence[Row],
        loss: str | LossOfLogprobs = "sft",
        *,
        advantages: Sequence[npt.ArrayLike] | None = None,
        old_logprobs: Sequence[npt.ArrayLike] | None = None,
    ) -> dict[str, float]:
        """Adds the gradient of a loss on rows to those of earlier calls, and returns the metrics of these rows.

        rows: of data, as `data.train` has them, or answers of `sample`. The gradient of an update is that of
        (sum of losses) / (sum of weights) over all calls since the last one, so that several calls are one call with
        all rows. loss: `sft`; `grpo` or `rloo` of answers, with the settings of `method`; or a function of the
        log-probabilities of the trained tokens of all rows, under `rollout.temperature` and without dropout, that
        returns the sum of its losses and their number. It is called with `jax.Array`s, and JAX differentiates it.
        advantages: for `grpo` and `rloo`, a number for each answer, or an array over its trained tokens. old_logprobs:
        of the trained tokens of each answer, as `logprobs` gave them before the first update on them; without them
        the ratio of the policies is 1.

        Raises ConfigError for an unknown loss, for one of another kind than earlier calls had, and for settings it
        cannot work with; DataError, naming the row, for rows that cannot be read or are too long.
        """
        config, kind = self.config, loss if isinstance(loss, str) else "function"
        if self._kind not in (None, kind):
            raise ConfigError(
                f"the gradients since the last update are of loss={self._kind!r}, and these are of {kind!r}, whose "
                "units are others: call optim_step between them"
            )
        examples = examples_of(rows, config, self.tokenizer)
        if not isinstance(loss, str):
            return self._of_function(pack_examples(plain(examples), config, self.tokenizer.pad_id), loss)
        method_loss = loss_of(loss, config, self._model)
        if loss == "sft":
            if advantages is not None or old_logprobs is not None:
                raise ConfigError("loss='sft' reads neither advantages nor old_logprobs: leave them out, or use 'grpo'")
            examples = plain(examples)
        else:
            examples = with_numbers(
                examples, policy_rows(rows, loss, advantages, config.rollout.temperature), old_logprobs
            )
        packed = pack_examples(examples, config, self.tokenizer.pad_id)
        return self._collect(kind, method_loss, packed.batches)

    def optim_step(self, learning_rate: float | None = None) -> dict[str, float]:
        """Updates the weights by the gradients of all `forward_backward` calls since the last update.

        learning_rate: of this update; by default that of the schedule. Returns loss, grad_norm, learning_rate,
        trained_tokens and the other metrics of a step of `jaxft train`. If no token was trained, nothing changes but
        the step, and skipped_updates is 1. Raises ConfigError if there are no gradients.
        """
        if self._sums is None:
            raise ConfigError("there are no gradients to update with: call forward_backward first")
        given = learning_rate is not None
        if given not in self._updates:
            self._updates[given] = self._jitted_update(given)
        rate = jnp.float32(learning_rate or 0.0)
        grads, sums = self._grads, self._sums
        self._forget()
        self._state, metrics = self._updates[given](self._state, grads, sums, rate)
        return {name: float(value) for name, value in jax.device_get(metrics).items()}

    def sample(
        self,
        prompts: GivenPrompt | Sequence[GivenPrompt],
        n: int = 1,
        *,
        temperature: float | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
    ) -> list[list[Answer]]:
        """n answers to each prompt, with their tokens and log-probabilities, by the weights as they are now.

        prompts: text, which is continued, or lists of chat messages; one, or a list of them. temperature: by default
        `rollout.temperature`; 0 is greedy. max_new_tokens: by default `rollout.max_completion_length`, or as many as
        fit into `data.max_length`. seed: of the draws; by default one that follows from `seed` of the config and the
        number of such calls, which `save_state` saves. Raises DataError for a prompt that cannot be read or is too
        long.
        """
        if n < 1:
            raise ConfigError(f"n={n} must be at least 1")
        config = self.config
        temperature = config.rollout.temperature if temperature is None else temperature
        given = [{config.data.prompt_field: prompt} for prompt in as_prompts(prompts)[0]]
        first = virtual_ids(config.adapter.virtual_tokens)
        read = list(read_prompts(GivenRows(given), config.data, self.tokenizer, first))
        if seed is None:
            seed, self._draws = seed_of(config.seed, self._draws), self._draws + 1
        sampler = Sampler(
            tokenizer=self.tokenizer,
            group=n,
            max_completion_length=max_new_tokens or self._room(read),
            length=config.data.max_length,
            slots=config.rollout.slots,
        )
        model = nnx.merge(self._graphdef, self._state.trainable, self._state.frozen)
        answers = [
            Answer(
                prompt_tokens=np.asarray(one.prompt.tokens, np.int32),
                tokens=one.tokens,
                logprobs=one.logprobs,
                temperature=temperature,
                text=one.text,
                finish_reason=one.finish_reason,
            )
            for one in sampler.sample(model, read, temperature=temperature, seed=seed)
        ]
        return [answers[start : start + n] for start in range(0, len(answers), n)]

    def logprobs(self, rows: Sequence[Row], *, temperature: float | None = None) -> list[np.ndarray]:
        """The log-probability of every trained token of each row in nats, float32 [n], without dropout.

        temperature: divides the logits; by default `rollout.temperature`.
        """
        examples = plain(examples_of(rows, self.config, self.tokenizer))
        packed = pack_examples(examples, self.config, self.tokenizer.pad_id)
        return self._logprobs(packed, self.config.rollout.temperature if temperature is None else temperature)

    def save_state(self, folder: str) -> None:
        """Writes a checkpoint from which `load_state` goes on bit for bit, as a run folder.

        `jaxft export --run`, `jaxft sample --model` and others read the folder. It may hold earlier steps of this
        session, of which the newest `checkpoint.keep` stay. Raises ConfigError if gradients wait for their update or
        the folder holds a run with other settings; FolderInUseError if another process writes there, as this one may
        until the session is deleted; CheckpointError if the step exists or cannot be written.
        """
        if self._sums is not None:
            raise ConfigError("gradients wait for their update, and are not saved: call optim_step first")
        path = folder_of_state(folder)
        self._open(path)
        with RunCheckpoints(checkpoints_of(path), keep=self.config.checkpoint.keep) as checkpoints:
            extra = {"step": self.step, "progress": {}, "held_out": {}, "draws": self._draws}
            checkpoints.save(self.step, saved_part(self._state), extra | {"config": self.config.to_dict()})

    def load_state(self, folder: str, step: int | None = None) -> None:
        """Goes on from a checkpoint of `save_state`, or of a run of `jaxft train` with the same model and optimizer.

        step: the newest if None. Gradients that wait for their update are forgotten. Raises CheckpointError if the
        checkpoint is damaged or of another model, adapter or optimizer, and ConfigError if there is none, or if it was
        trained on a base with other weights.
        """
        path = folder_of(folder)
        on_primary(partial(refuse_other_base, path, reads_of(self.config, self.tokenizer)))
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._state)
        saved, extra = read_step(path, step, partial(_restored, saved_part(shapes)))
        self._state = with_saved(self._state, saved)
        self._draws = int(extra.get("draws", 0))
        self._forget()

    def export(self, folder: str, *, format: str | None = None, dtype: str | None = None) -> dict[str, Any]:
        """Writes the model as a PEFT folder (`adapter`) or a whole Hugging Face folder (`merged`), and reads it back.

        format: by default `adapter` if there is one. dtype: of a merged model's tensors. Returns the folder, the
        format and `checks`, by reader the largest difference of its logits from those of this model. Raises ExportError
        if a reader differs by more than rounding, or the folder is not empty.
        """
        module = self._loaded.module
        has_adapter = bool(adapters(module) or virtual_modules(module))
        format = format or ("adapter" if has_adapter else "merged")
        if format not in FORMATS or (format == "adapter" and not has_adapter):
            raise ConfigError(f"format={format!r} cannot be written of this model: use 'merged'")
        with new_export(folder) as target:
            nnx.update(module, evaluated_weights(self.config, self._state), self._state.frozen)
            checks = write(self._loaded, self.tokenizer, target, format=format, dtype=dtype, mesh=self.mesh)
        return {"folder": folder, "format": format, "checks": {check.reader: check.difference for check in checks}}

    def _open(self, folder: Path) -> None:
        """Makes a run folder of a path, or refuses it, as for a whole run."""
        reads, template = reads_of(self.config, self.tokenizer), self.tokenizer.chat_template
        self._folders.open(folder, self.config, reads, template)

    def _forget(self) -> None:
        self._kind: str | None = None
        self._grads: Any = None
        self._sums: LossSums | None = None
        self._parts = 0  # micro-batches since the last update

    def _room(self, prompts: Sequence[Prompt]) -> int:
        """The most tokens of answers to prompts, by default."""
        longest, length = max((len(prompt) for prompt in prompts), default=0), self.config.data.max_length
        if longest >= length:
            raise DataError(
                f"the longest prompt has {longest} tokens, which leave no room for an answer in data.max_length="
                f"{length}: raise it, or shorten the prompt"
            )
        return min(self.config.rollout.max_completion_length, length - longest)

    def _collect(self, kind: str, loss: Loss, batches: Sequence[Batch[np.ndarray]]) -> dict[str, float]:
        """Adds the gradients on batches to those that wait. Returns the metrics of these batches."""
        sums, parts = self._summed(kind, loss, batches)
        self._take(kind, sums, parts)
        return _metrics(sums)

    def _take(self, kind: str, sums: LossSums, parts: int) -> None:
        self._sums = sums if self._sums is None else added(self._sums, sums)
        self._kind, self._parts = kind, self._parts + parts

    def _summed(self, kind: str, loss: Loss, batches: Sequence[Batch[np.ndarray]]) -> tuple[LossSums, int]:
        """The sums over batches, whose gradients are added to those that wait, and the number of batches."""
        if kind not in self._gradients:
            self._gradients[kind] = self._jitted_gradients(loss)
        if self._grads is None:
            self._grads = self._zeros(self._state.trainable)
        whole: LossSums | None = None
        for number, batch in enumerate(batches):
            part = np.int32(self._parts + number)
            self._grads, sums = self._gradients[kind](self._grads, self._state, self._on_devices(batch), part)
            whole = sums if whole is None else added(whole, sums)
        if whole is None:
            raise RuntimeError("there is no batch")
        return whole, len(batches)

    def _of_function(self, packed: Packed, function: LossOfLogprobs) -> dict[str, float]:
        """`forward_backward` of a caller's loss: its gradient by each log-probability, then theirs by the weights."""
        temperature = self.config.rollout.temperature
        logps = [jnp.asarray(one) for one in self._logprobs(packed, temperature)]

        def total(logps: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
            summed, units = function(logps)
            return jnp.asarray(summed, jnp.float32), jnp.asarray(units, jnp.float32)

        (value, units), slopes = jax.value_and_grad(total, has_aux=True)(logps)
        batches = list(packed.with_trained_values(SLOPES, [np.asarray(one) for one in slopes]))
        sums, parts = self._summed("function", partial(linear_loss, temperature=temperature), batches)
        sums = sums._replace(total=value, weight=units)
        self._take("function", sums, parts)
        return _metrics(sums)

    def _logprobs(self, packed: Packed, temperature: float) -> list[np.ndarray]:
        if temperature not in self._logps:
            self._logps[temperature] = self._jitted_logps(temperature)
        logps = partial(self._logps[temperature], self._state.trainable, self._state.frozen)
        return packed.trained_values([to_host(logps(self._on_devices(batch))) for batch in packed.batches])

    def _on_devices(self, batch: Batch[np.ndarray]) -> Batch[jax.Array]:
        return from_rows(partial(rows_of, batch), len(batch.tokens_BS), self.mesh.batch_sharding())

    def _jitted_gradients(self, loss: Loss) -> Callable[..., tuple[Any, LossSums]]:
        dtype = jnp.dtype(self.config.train.gradient_dtype or self.config.model.dtype)
        gradients = make_gradients(self._graphdef, loss, gradient_dtype=dtype)

        def add(grads: Any, state: TrainState, batch: Any, part: jax.Array) -> tuple[Any, LossSums]:
            new, sums = gradients(state, batch, part)
            return jax.tree.map(lambda x, y: x + y.astype(jnp.float32), grads, new), sums

        shardings = jax.tree.map(lambda x: x.sharding, self._state.trainable)
        options = step_options(self.mesh.mesh.devices.flat[0])
        return jax.jit(self.mesh.bind(add), donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)

    def _jitted_update(self, given: bool) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """given: whether the learning rate is an argument, in place of the schedule's."""

        def update(state: TrainState, grads: Any, sums: LossSums, rate: jax.Array) -> Any:
            schedule = (lambda count: rate) if given else self._schedule
            tx = make_tx(self.config, self._model, schedule)
            return make_update(tx, schedule, skips_empty=True)(state, grads, sums)

        shardings = jax.tree.map(lambda x: x.sharding, self._state)
        return jax.jit(self.mesh.bind(update), donate_argnums=0, out_shardings=(shardings, None))

    def _jitted_logps(self, temperature: float) -> Callable[..., jax.Array]:
        def logps(trainable: nnx.State, frozen: nnx.State, batch: Batch[jax.Array]) -> jax.Array:
            return policy_logps(nnx.merge(self._graphdef, trainable, frozen), batch, temperature=temperature)

        return jax.jit(self.mesh.bind(logps))


def _restored(shapes: Any, checkpoints: RunCheckpoints, step: int) -> tuple[Any, dict[str, Any]]:
    restored = checkpoints.restore(shapes, step)
    if restored is None:
        raise RuntimeError(f"there is no step {step}")
    return restored


def _metrics(sums: LossSums) -> dict[str, float]:
    means = sums.means() | {"num_tokens": sums.tokens, "trained_tokens": sums.trained_tokens}
    return {name: float(value) for name, value in jax.device_get(means).items()}
