"""Records advantages of TRL's GRPO and RLOO for the tests: `python tests/oracles/record_advantages.py`.

It needs torch and TRL, and writes advantages.npz beside itself. The trainers' own methods compute the advantages; what
they would generate, score or run through a model is given to them. The tests need neither torch nor TRL.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import trl
import trl.trainer.grpo_trainer
import trl.trainer.rloo_trainer
from advantage_cases import GENERATIONS, GRPO, REWARDS, RLOO, log_ratios
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

# Without processes to gather from.
trl.trainer.rloo_trainer.gather = lambda x: x


def trainer_of(**fields):
    """A trainer whose answers have two tokens, log-probabilities of 0 under the reference, and the given rewards."""
    logps = torch.as_tensor(log_ratios())
    reference = object()
    count = len(REWARDS)
    generated = ([[1]] * count, [[2, 3]] * count, ["text"] * count)
    metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    return SimpleNamespace(
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False), ref_model=reference, tools=None,
        environment_factories=None, environments=None, use_vllm=False, pad_to_multiple_of=None, num_iterations=1,
        mask_truncated_completions=False, _tokenizer=SimpleNamespace(pad_token_id=0), num_generations=GENERATIONS,
        num_generations_eval=GENERATIONS, reward_weights=torch.ones(1), reward_func_names=["reward"],
        reward_funcs=[None], _metrics=metrics, _pending_extra_logs={}, _pending_metrics={}, log_multimodal=False,
        _logs=defaultdict(lambda: defaultdict(list), prompt=[], completion=[], advantages=[]),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, reduce=lambda x, reduction: x, process_index=0,
        ),
        args=SimpleNamespace(
            per_device_train_batch_size=count, steps_per_generation=1, gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
        ),
        _calculate_rewards=lambda *given: torch.as_tensor(REWARDS)[:, None],
        _get_per_token_logps_and_entropies=lambda model, *given, **named: (
            0 * logps if model is reference else logps, None, None
        ),
        _generate=lambda prompts: generated, **fields,
    )  # fmt: skip


def main():
    inputs = [{"prompt": "text"}] * len(REWARDS)
    out = {}
    for name, scale in GRPO.items():
        trainer = trainer_of(scale_rewards=scale, beta=0.0, multi_objective_aggregation="sum_then_normalize")
        ids, answers, texts = trainer._generate(None)
        trainer._generate = lambda prompts, given=(ids, answers, None, texts, None, {}, None, None): given
        result = GRPOTrainer._generate_and_score_completions(trainer, inputs)
        out[f"grpo/{name}"] = result["advantages"].numpy()
        metrics = {key: value[0] for key, value in trainer._metrics["train"].items()}
    out["metrics"] = np.array(json.dumps({key: metrics[key] for key in ("reward", "reward_std")}))
    for name, settings in RLOO.items():
        trainer = trainer_of(
            beta=settings.get("beta", 0.0), normalize_advantages=settings.get("normalize", False),
            reward_clip_range=None,
        )  # fmt: skip
        out[f"rloo/{name}"] = RLOOTrainer._generate_and_score_completions(trainer, inputs)["advantages"].numpy()
    for name, value in out.items():
        print(name, value)
    np.savez_compressed(Path(__file__).with_name("advantages.npz"), trl_version=np.array(trl.__version__), **out)


if __name__ == "__main__":
    main()
