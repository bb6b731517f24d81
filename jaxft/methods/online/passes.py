"""Forward passes over sampled answers that an update needs before its loss: of policy, reference and critic."""

# B rows, S sequence

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from flax import nnx

from jaxft.adapters.critic import critic_values
from jaxft.data.batch import Batch
from jaxft.methods.method import Run
from jaxft.methods.parts.reference import reference_model
from jaxft.nn.decoder import Decoder
from jaxft.objectives.loss import MethodState
from jaxft.objectives.policy.loss import policy_logps
from jaxft.sharding.arrays import from_rows, to_host
from jaxft.training.state import TrainState


class Passes:
    """The passes of one run. They have the shapes of micro-batches, so that they need no more memory than a step."""

    def __init__(self, run: Run, graphdef: nnx.GraphDef[Decoder]) -> None:
        self._run = run
        temperature = run.config.rollout.temperature
        logps = partial(policy_logps, temperature=temperature)

        def policy(
            trainable: nnx.State, frozen: nnx.State, method: MethodState | None, batch: Batch[jax.Array]
        ) -> jax.Array:
            return logps(nnx.merge(graphdef, trainable, frozen), batch)

        def reference(
            trainable: nnx.State, frozen: nnx.State, method: MethodState | None, batch: Batch[jax.Array]
        ) -> jax.Array:
            return logps(reference_model(nnx.merge(graphdef, trainable, frozen), method), batch)

        def values(
            trainable: nnx.State, frozen: nnx.State, method: MethodState | None, batch: Batch[jax.Array]
        ) -> jax.Array:
            model = nnx.merge(graphdef, trainable, frozen)
            return critic_values(model, batch)

        self._policy, self._reference, self._values = (
            jax.jit(run.mesh.bind(one)) for one in (policy, reference, values)
        )

    def policy_logps(self, state: TrainState, batch: Batch[np.ndarray]) -> np.ndarray:
        """The log-probability of every trained token under the weights of a state, in nats, [B, S] float32."""
        return self._by_rows(self._policy, state, batch)

    def reference_logps(self, state: TrainState, batch: Batch[np.ndarray]) -> np.ndarray:
        """The same under the reference, the model at the start of the run."""
        return self._by_rows(self._reference, state, batch)

    def values(self, state: TrainState, batch: Batch[np.ndarray]) -> np.ndarray:
        """What the critic predicts at every position, [B, S] float32."""
        return self._by_rows(self._values, state, batch)

    def _by_rows(self, compute: Callable[..., jax.Array], state: TrainState, batch: Batch[np.ndarray]) -> np.ndarray:
        rows = len(batch.tokens_BS)
        count = rows // self._run.config.train.accumulation_steps
        parts = []
        for start in range(0, rows, count):
            part = rows_of(batch, slice(start, start + count))
            device = from_rows(partial(rows_of, part), count, self._run.mesh.batch_sharding())
            parts.append(to_host(compute(state.trainable, state.frozen, state.method, device)))
        return np.concatenate(parts)


def rows_of(batch: Batch[np.ndarray], rows: slice) -> Batch[np.ndarray]:
    """Some rows of a batch in host memory."""
    return jax.tree.map(lambda x: x[rows], batch)
