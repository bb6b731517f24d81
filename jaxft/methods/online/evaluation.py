"""The held-out evaluation of methods that learn from rewards: greedy answers, judged by the same functions."""

from collections.abc import Callable

import numpy as np
from flax import nnx

from jaxft.data.prompts import Prompt
from jaxft.errors import DataError
from jaxft.files.run_folder import HELD_OUT_COMPLETIONS
from jaxft.methods.method import Run
from jaxft.methods.online.feed import sampler_of
from jaxft.methods.online.judge import Judge
from jaxft.methods.parts.sequences import Evaluator, evaluated_weights
from jaxft.nn.decoder import Decoder
from jaxft.rollouts.completions import CompletionsLog
from jaxft.rollouts.judged import Judged
from jaxft.rollouts.rollout import completion_metrics
from jaxft.sharding.processes import is_primary
from jaxft.training.state import TrainState


def evaluator(run: Run, graphdef: nnx.GraphDef[Decoder]) -> Evaluator | None:
    """Held-out metrics: `eval_reward`, the mean of each function, and the lengths of the answers.

    The answers of every evaluation of a run are written to `held_out_completions.jsonl`.
    """
    prompts = [prompt for prompt in run.data.eval_examples or [] if isinstance(prompt, Prompt)]
    if not prompts:
        return None
    sampler, judge = sampler_of(run, group=1), Judge(run, graphdef)
    logs: list[CompletionsLog] = []

    def write(step: int, judged: Judged) -> None:
        if run.held_out_only or not is_primary() or not run.config.rollout.log_completions:
            return
        if not logs:
            logs.append(CompletionsLog(run.folder, step - 1, HELD_OUT_COMPLETIONS, say=run.print_line))
        logs[0].add(step, judged.rollouts, judged.by_function, {"reward": judged.rewards})

    def evaluate(state: TrainState, between: Callable[[], None]) -> dict[str, float]:
        between()
        model = nnx.merge(graphdef, evaluated_weights(run.config, state), state.frozen)
        judged = judge(state, sampler.sample(model, prompts, temperature=0.0, seed=0))
        write(int(state.step), judged)
        scored = judged.rewards[~np.isnan(judged.rewards)]
        if not len(scored):
            raise DataError("nothing scored any answer to a held-out prompt, so there is no held-out reward")
        means = {name: value for name, value in judged.function_metrics.items() if name.endswith("/mean")}
        metrics = {"reward": float(scored.mean()), **means, **completion_metrics(judged.rollouts)}
        return {f"eval_{name}": value for name, value in metrics.items()}

    return evaluate
