"""Records TRL's divergences and their gradients for the tests: `python tests/oracles/record_distill.py`.

It needs torch, transformers and TRL, and writes distill.npz beside itself, with the weights and tokens that they are
of. The tests need none of the three.
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
import trl
from trl.experimental.gkd import GKDTrainer
from trl.experimental.server_distillation.server_distillation_trainer import _add_tail_bucket, _jsd_divergence
from trl.trainer.distillation_trainer import _chunked_divergence_loss

BETAS, TEMPERATURES, TOP = (0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 2.0), 5
COMMON = {
    "vocab_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
SIZES = {
    "student": COMMON | {"hidden_size": 16, "intermediate_size": 24},
    "teacher": COMMON | {"hidden_size": 24, "intermediate_size": 32},
}
RECORDED = ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight")


def model_of(name, seed):
    config = transformers.LlamaConfig(**SIZES[name])
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.1 if parameter.ndim == 1 else 0.25, generator=generator)
    return model


def recorded(loss, student):
    student.zero_grad()
    loss.backward()
    parameters = dict(student.named_parameters())
    gradients = np.concatenate([parameters[key].grad.numpy().ravel() for key in RECORDED])
    return {"loss": np.float64(loss.detach()), "gradients": gradients}


def main():
    student, teacher = model_of("student", 0), model_of("teacher", 1)
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 48, (3, 12))
    mask = (np.arange(12) >= np.array([[3], [5], [4]])) & (np.arange(12) < np.array([[12], [9], [11]]))
    mask[:, 0] = False
    out = {"trl_version": np.array(trl.__version__), "tokens": tokens, "mask": mask}
    for name, model in (("student", student), ("teacher", teacher)):
        out[f"{name}/config"] = np.array(json.dumps(SIZES[name]))
        out |= {f"{name}/{key}": parameter.detach().numpy().copy() for key, parameter in model.named_parameters()}
    ids, keep = torch.tensor(tokens), torch.tensor(mask[:, 1:])
    with torch.no_grad():
        teacher_hidden = teacher.model(ids).last_hidden_state[:, :-1]
        teacher_logits = teacher.lm_head(teacher_hidden)
    labels = torch.where(keep, ids[:, 1:], -100)
    for beta in BETAS:
        for temperature in TEMPERATURES:
            hidden = student.model(ids).last_hidden_state[:, :-1]
            loss = GKDTrainer.generalized_jsd_loss(
                student.lm_head(hidden), teacher_logits, labels, beta=beta, temperature=temperature
            )
            whole = recorded(loss, student)
            hidden = student.model(ids).last_hidden_state[:, :-1]
            loss, _, _ = _chunked_divergence_loss(
                hidden, teacher_hidden, student.lm_head.weight, teacher.lm_head.weight, keep.long(), beta,
                temperature=temperature,
            )  # fmt: skip
            chunked = recorded(loss, student)
            for key in whole:
                np.testing.assert_allclose(chunked[key], whole[key], rtol=0, atol=1e-5 * np.abs(whole[key]).max())
            out |= {f"whole/{beta}/{temperature}/{key}": value for key, value in whole.items()}
            top_logps, top_ids = torch.log_softmax(teacher_logits / temperature, -1).topk(TOP, dim=-1)
            logps = torch.log_softmax(student.lm_head(student.model(ids).last_hidden_state[:, :-1]) / temperature, -1)
            valid = torch.ones_like(top_ids, dtype=torch.bool)
            theirs, valid_and_tail = _add_tail_bucket(top_logps, valid)
            ours, _ = _add_tail_bucket(logps.gather(-1, top_ids), valid)
            divergence = _jsd_divergence(ours, theirs, beta, valid_and_tail)
            top = recorded(divergence[keep].sum() / keep.sum(), student)
            out |= {f"top/{beta}/{temperature}/{key}": value for key, value in top.items()}
            print(beta, temperature, whole["loss"], top["loss"])
    np.savez_compressed(Path(__file__).with_name("distill.npz"), **out)


if __name__ == "__main__":
    main()
