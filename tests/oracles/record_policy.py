"""Records losses, metrics and gradients of TRL's GRPO and RLOO for the tests: `python tests/oracles/record_policy.py`.

It needs torch, transformers and TRL, and writes policy.npz beside itself. The tests need none of the three. Beside the
results it holds the log-probabilities of the old policy and of the reference, with which TRL computed them.
"""

import contextlib
import json
from collections import defaultdict
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import torch
import trl
from policy_cases import (
    CASES,
    CUT_OFF,
    LONGEST,
    RLOO_CASES,
    advantages,
    answers,
    sampler_differences,
    settings_of,
)
from tiny_model import RECORDED, torch_model
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.utils import add_fused_lm_head

# The policy is this far from the weights that sampled, so that ratios are on both sides of the clip.
MOVED, OLD = 0.3, 0.22


def model_of(moved, temperature):
    """The tiny model with TRL's fused head."""
    model = torch_model(moved)
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    add_fused_lm_head(model, temperature=temperature, outputs=outputs)
    return model


def inputs_of(rows):
    """What TRL's trainers give their loss for (prompt, answer, mask) rows: prompts padded on the left."""
    width = max(len(prompt) for prompt, _, _ in rows)
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "tool_mask")
    out = {name: torch.zeros(len(rows), width if "prompt" in name else LONGEST, dtype=torch.long) for name in names}
    for index, (prompt, answer, mask) in enumerate(rows):
        out["prompt_ids"][index, width - len(prompt) :] = torch.as_tensor(prompt)
        out["prompt_mask"][index, width - len(prompt) :] = 1
        out["completion_ids"][index, : len(answer)] = torch.as_tensor(answer)
        out["completion_mask"][index, : len(answer)] = 1
        out["tool_mask"][index, : len(answer)] = torch.as_tensor(mask)
    return out


def trainer_of(cls, model, **fields):
    """The fields of a trainer that its `_compute_loss` reads."""
    trainer = SimpleNamespace(
        model=model, aux_loss_enabled=False, _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), num_processes=1, sync_gradients=True, autocast=contextlib.nullcontext,
            gather=lambda x: x, gather_for_metrics=lambda x: x, reduce=lambda x, reduction: x,
            unwrap_model=lambda x: x, is_main_process=True,
        ),
        **fields,
    )  # fmt: skip
    own = cls._get_per_token_logps_and_entropies
    trainer._get_per_token_logps_and_entropies = MethodType(own, trainer)
    return trainer


def logps_of(moved, temperature, inputs):
    """Log-probabilities of the answers' tokens under other weights, [n, LONGEST]."""
    model = model_of(moved, temperature)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    with torch.no_grad():
        logps, _, _ = trainer_of(GRPOTrainer, model)._get_per_token_logps_and_entropies(model, ids, mask, LONGEST)
    return logps


def by_grpo(case):
    """(loss, metrics, model) by GRPOTrainer."""
    settings = {"loss_type": "dapo", "importance_sampling_level": "token", "epsilon": 0.2, "beta": 0.0} | settings_of(
        case
    )
    temperature, cap = settings.get("temperature", 1.0), settings.get("importance_cap")
    inputs, policy = inputs_of(answers()), model_of(MOVED, temperature)
    old, reference = (logps_of(moved, temperature, inputs) for moved in (OLD, 0.0))
    if not CASES[case].get("on_policy"):
        inputs["old_per_token_logps"] = old
    if settings["beta"]:
        inputs["ref_per_token_logps"] = reference
    if settings.get("mask_truncated_completions"):
        inputs["completion_mask"][CUT_OFF] = 0
        inputs["tool_mask"][CUT_OFF] = 0
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    inputs["num_items_in_batch"] = mask.sum()
    inputs["advantages"] = torch.as_tensor(advantages()[1 if CASES[case].get("by_token") else 0])
    if cap is not None:
        difference = -torch.as_tensor(sampler_differences()) * mask
        inputs["importance_sampling_ratio"] = torch.clamp(torch.exp(difference), max=cap)
    high = settings.get("epsilon_high")
    trainer = trainer_of(
        GRPOTrainer, policy, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        importance_sampling_level=settings["importance_sampling_level"], beta=settings["beta"],
        loss_type=settings["loss_type"], epsilon_low=settings["epsilon"],
        epsilon_high=settings["epsilon"] if high is None else high, use_vllm=cap is not None,
        vllm_importance_sampling_correction=cap is not None, current_gradient_accumulation_steps=1,
        max_completion_length=settings.get("max_completion_length"), use_adaptive_entropy=False,
        _entropy_bonus_enabled=bool(settings.get("entropy_coef")), entropy_coef=settings.get("entropy_coef", 0.0),
        args=SimpleNamespace(
            use_bias_correction_kl=settings.get("kl_estimator", "k3_ratio") == "k3_ratio",
            delta=settings.get("delta"), steps_per_generation=1,
        ),
    )  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, policy, inputs)
    return loss, trainer._metrics["train"], policy, (old, reference)


def by_rloo(case):
    """The same by RLOOTrainer, which knows no tools: all tokens of an answer count."""
    settings = RLOO_CASES[case]
    inputs, policy = inputs_of(answers()), model_of(MOVED, 1.0)
    old = logps_of(OLD, 1.0, inputs)
    inputs["old_logps"] = (old * inputs["completion_mask"]).sum(1)
    inputs["advantages"] = torch.as_tensor(advantages()[0])
    high = settings.get("epsilon_high", settings["epsilon"])
    trainer = trainer_of(RLOOTrainer, policy, epsilon_low=settings["epsilon"], epsilon_high=high)
    return RLOOTrainer._compute_loss(trainer, policy, inputs), trainer._metrics["train"], policy, (old, None)


def main():
    out = {}
    for name in (*CASES, *RLOO_CASES):
        loss, metrics, policy, (old, reference) = (by_grpo if name in CASES else by_rloo)(name)
        policy.zero_grad()
        loss.backward()
        parameters = dict(policy.named_parameters())
        values = {"loss": float(loss.detach()), **{key: float(value[0]) for key, value in metrics.items()}}
        print(name, values)
        out[f"{name}/values"] = np.array(json.dumps(values))
        out[f"{name}/gradients"] = np.concatenate([parameters[key].grad.numpy().ravel() for key in RECORDED])
        out[f"{name}/old"] = old.numpy()
        if reference is not None and values.get("kl"):
            out[f"{name}/reference"] = reference.numpy()
    recorded = {name: json.loads(str(out[f"{name}/values"])) for name in (*CASES, *RLOO_CASES)}
    for name in ("grpo", "luspo", "gspo", "by token", "rloo"):
        values = recorded[name]
        assert values["clip_ratio/low_mean"] > 0 and values["clip_ratio/high_mean"] > 0, f"{name}: nothing is clipped"
    assert recorded["cispo"]["cispo_clip_ratio"] > 0, "cispo: nothing is limited"
    assert recorded["delta"]["loss"] != recorded["bnpo"]["loss"], "delta limits nothing"
    np.savez_compressed(Path(__file__).with_name("policy.npz"), trl_version=np.array(trl.__version__), **out)


if __name__ == "__main__":
    main()
