"""Records losses, metrics and gradients of TRL's pair losses for the tests: `python tests/oracles/record_pairs.py`.

It needs torch, transformers and TRL, and writes dpo.npz and reference_free.npz beside itself. The tests need none of
the three.
"""

import contextlib
import json
from collections import defaultdict
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import torch
import trl
from pair_cases import ALL, settings
from tiny_model import RECORDED, pairs, torch_model
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import add_fused_lm_head

MOVED = 0.3
ACCELERATOR = SimpleNamespace(
    device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x,
    autocast=contextlib.nullcontext,
)  # fmt: skip


def padded(rows, value=0):
    """Rows of different lengths as one tensor, filled up on the right."""
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.as_tensor(row)
    return out


def documents(rows, side):
    """(tokens, 1 on tokens, 1 on those of answers) of the chosen (1) or rejected (2) documents."""
    return [(np.r_[row[0], row[side]], np.r_[0 * row[0], 0 * row[side] + 1]) for row in rows]


def by_dpo(rows, case):
    """(loss, metrics, model) by DPOTrainer, called with the fields of a trainer that it reads."""
    case = {"beta": 0.1, "label_smoothing": 0.0, "loss_type": "sigmoid", "sft_weight": 0.0, **case}
    names = case["loss_type"].split(",")
    weights = [float(x) for x in case["loss_weights"].split(",")] if "loss_weights" in case else [1.0] * len(names)
    if names == ["sigmoid"] and case["label_smoothing"]:
        names = ["aot"]  # of a single pair it is the smoothed sigmoid loss, which its sigmoid is not
        assert len(rows) == 1
    if case["sft_weight"]:
        names, weights = [*names, "sft"], [*weights, case["sft_weight"]]
    policy, reference = torch_model(MOVED), torch_model()
    for model in (policy, reference):
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
        add_fused_lm_head(model, temperature=1.0, outputs=outputs)
    trainer = SimpleNamespace(
        model=policy, ref_model=reference, ld_alpha=case.get("ld_alpha"), aux_loss_enabled=False,
        precompute_ref_logps=False, f_divergence_type=case.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=case.get("f_alpha_divergence_coef", 0.5), loss_types=names, loss_weights=weights,
        beta=case["beta"], label_smoothing=case["label_smoothing"], use_weighting=case.get("use_weighting", False),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        accelerator=ACCELERATOR,
    )  # fmt: skip
    both = documents(rows, 1) + documents(rows, 2)
    inputs = {
        "input_ids": padded([tokens for tokens, _ in both]),
        "attention_mask": padded([np.ones_like(tokens) for tokens, _ in both]),
        "completion_mask": padded([mask for _, mask in both]),
    }
    loss = DPOTrainer._compute_loss(trainer, policy, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}, policy


def trainer_of(cls, **fields):
    """The fields of an ORPOTrainer or a CPOTrainer that its losses read, with the methods that they call."""
    trainer = SimpleNamespace(
        accelerator=ACCELERATOR, is_encoder_decoder=False, padding_value=0, pad_token_id=0, aux_loss_enabled=False,
        **fields,
    )  # fmt: skip
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, name, getattr(cls, name))
    for name in ("concatenated_forward", "odds_ratio_loss", "cpo_loss"):
        if hasattr(cls, name):
            setattr(trainer, name, MethodType(getattr(cls, name), trainer))
    return trainer


def batch_of(rows):
    batch = {}
    for name, side in (("chosen", 1), ("rejected", 2)):
        both = documents(rows, side)
        batch[f"{name}_input_ids"] = padded([tokens for tokens, _ in both])
        batch[f"{name}_attention_mask"] = padded([np.ones_like(tokens) for tokens, _ in both])
        batch[f"{name}_labels"] = padded([np.where(mask, tokens, -100) for tokens, mask in both], -100)
    return batch


def by_cpo(rows, case):
    """The same by CPOTrainer."""
    case = {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5, **case}
    policy, trainer = torch_model(MOVED), trainer_of(CPOTrainer, alpha=0.0, **case)
    loss, metrics = CPOTrainer.get_batch_loss_metrics(trainer, policy, batch_of(rows), "train")
    return loss, metrics, policy


def by_simpo(rows, case):
    case = {"beta": 2.0, "gamma": 0.5, **case}
    gamma = case.pop("gamma")
    return by_cpo(rows, {**case, "loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": gamma})


def by_orpo(rows, case):
    """The same by ORPOTrainer; without prompts, the negative log-likelihood is that of CPOTrainer."""
    policy, trainer = torch_model(MOVED), trainer_of(ORPOTrainer, beta=case["beta"])
    loss, metrics = ORPOTrainer.get_batch_loss_metrics(trainer, policy, batch_of(rows), "train")
    if not case.get("nll_on_prompt"):
        other = trainer_of(CPOTrainer, alpha=0.0, beta=1.0, loss_type="ipo", cpo_alpha=1.0)
        chosen, rejected, _, _, nll = CPOTrainer.concatenated_forward(other, policy, batch_of(rows))
        terms, *_ = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
        loss, metrics = nll - terms.mean(), metrics | {"nll_loss": float(nll.detach())}
    return loss, metrics, policy


BY = {"dpo": by_dpo, "orpo": by_orpo, "cpo": by_cpo, "simpo": by_simpo}


def main():
    files = {"dpo": {}, "reference_free": {}}
    for method, name in ALL:
        case = dict(settings(method, name))
        one = case.pop("pair", None)
        rows = pairs() if one is None else [pairs()[one]]
        loss, metrics, policy = BY[method](rows, case)
        policy.zero_grad()
        loss.backward()
        parameters = dict(policy.named_parameters())
        print(method, name, float(loss.detach()))
        values = {"loss": float(loss.detach()), **{key: float(value) for key, value in metrics.items()}}
        out = files["dpo" if method == "dpo" else "reference_free"]
        out[f"{method}/{name}/values"] = np.array(json.dumps(values))
        out[f"{method}/{name}/gradients"] = np.concatenate([parameters[key].grad.numpy().ravel() for key in RECORDED])
    for file, out in files.items():
        np.savez_compressed(Path(__file__).with_name(f"{file}.npz"), trl_version=np.array(trl.__version__), **out)


if __name__ == "__main__":
    main()
