"""Records losses, metrics and gradients of TRL's KTO for the tests: `python tests/oracles/record_kto.py`.

It needs torch, transformers and TRL, and writes kto.npz beside itself. The tests need none of the three. A row's
mismatched document has the answer of the row before, as in TRL's own batches.
"""

import contextlib
import json
from collections import defaultdict
from pathlib import Path
from types import MethodType, SimpleNamespace

import numpy as np
import torch
import trl
from kto_cases import CASES, rows_of, settings_of
from tiny_model import RECORDED, torch_model
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.utils import add_fused_lm_head

MOVED = 0.3


def padded(rows):
    """Rows of different lengths as one tensor, filled up on the right with 0."""
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.as_tensor(row)
    return out


def inputs_of(rows):
    """What TRL's collator gives for (prompt, answer, label) rows."""
    prompts, answers, labels = zip(*rows, strict=True)
    out = {"label": torch.tensor(labels)}
    for prefix, of_rows in (("", answers), ("KL_", answers[-1:] + answers[:-1])):
        both = list(zip(prompts, of_rows, strict=True))
        out[f"{prefix}input_ids"] = padded([np.r_[prompt, answer] for prompt, answer in both])
        out[f"{prefix}attention_mask"] = padded([np.r_[0 * prompt + 1, 0 * answer + 1] for prompt, answer in both])
        out[f"{prefix}completion_mask"] = padded([np.r_[0 * prompt, 0 * answer + 1] for prompt, answer in both])
    return out


def by_trl(rows, case):
    """(loss, metrics, model) by KTOTrainer, called with the fields of a trainer that it reads."""
    case = {"beta": 0.1, "loss_type": "kto", "desirable_weight": 1.0, "undesirable_weight": 1.0, **case}
    policy, reference = torch_model(MOVED), torch_model()
    for model in (policy, reference):
        outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
        add_fused_lm_head(model, temperature=1.0, outputs=outputs)
    trainer = SimpleNamespace(
        model=policy, ref_model=reference, aux_loss_enabled=False, precompute_ref_logps=False,
        calculate_KL=case["loss_type"] == "kto", _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather_for_metrics=lambda x: x, unwrap_model=lambda x: x,
            autocast=contextlib.nullcontext,
        ),
        **case,
    )  # fmt: skip
    trainer._compute_kl_logps = MethodType(KTOTrainer._compute_kl_logps, trainer)
    inputs = inputs_of(rows)
    if case["loss_type"] != "kto":
        inputs = {name: value for name, value in inputs.items() if not name.startswith("KL_")}
    loss = KTOTrainer._compute_loss(trainer, policy, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}, policy


def main():
    out = {}
    for name in CASES:
        loss, metrics, policy = by_trl(rows_of(name), settings_of(name))
        policy.zero_grad()
        loss.backward()
        parameters = dict(policy.named_parameters())
        values = {"loss": float(loss.detach()), **{key: float(value) for key, value in metrics.items()}}
        print(name, values)
        out[f"{name}/values"] = np.array(json.dumps(values))
        out[f"{name}/gradients"] = np.concatenate([parameters[key].grad.numpy().ravel() for key in RECORDED])
    assert json.loads(str(out["kto/values"]))["kl"] > 0, "an estimate of 0 tests nothing"
    np.savez_compressed(Path(__file__).with_name("kto.npz"), trl_version=np.array(trl.__version__), **out)


if __name__ == "__main__":
    main()
