"""Records what TRL's RewardTrainer computes on a tiny LlamaForSequenceClassification, in tests/oracles/reward.npz.

Run it by hand where TRL is installed: `python tests/oracles/record_reward.py`. The file holds the model's config.json
and weights, the documents of the pairs, their margins and, for each variant of the loss, its value, its metrics and the
gradients of three tensors.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
import trl
from trl import RewardTrainer

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
# Of each pair: the tokens of the prompt, of the chosen and of the rejected answer. Every document ends in token 1.
LENGTHS = ((3, 5, 7), (4, 9, 2), (2, 3, 3), (6, 4, 8))
MARGINS = (0.5, 0.0, 1.25, 2.0)
VARIANTS = {
    "plain": {},
    "margins": {"margins": True},
    "centred": {"center": 0.01},
    "both": {"margins": True, "center": 0.3},
}
GRADIENTS = ("score.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")


def model() -> torch.nn.Module:
    """The tiny reward model, with weights wide enough to show in the scores."""
    config = transformers.LlamaConfig(**SIZES, num_labels=1)
    config._attn_implementation = "eager"
    out = transformers.LlamaForSequenceClassification(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            spread = 0.1 if parameter.ndim == 1 else 0.25
            parameter.normal_(1.0 if "norm" in name else 0.0, spread, generator=generator)
    return out.float().eval()


def documents() -> list[tuple[list[int], list[int], int]]:
    """(chosen document, rejected document, tokens of the prompt) of each pair."""
    draws = np.random.default_rng(5)
    out = []
    for prompt, *answers in LENGTHS:
        start = draws.integers(3, 64, prompt).tolist()
        chosen, rejected = ([*start, *draws.integers(3, 64, length - 1).tolist(), 1] for length in answers)
        out.append((chosen, rejected, prompt))
    return out


def by_trl(module: torch.nn.Module, *, margins: bool = False, center: float | None = None) -> dict[str, np.ndarray]:
    """Loss, metrics and gradients of RewardTrainer.compute_loss, called with the fields of a trainer that it reads."""
    pairs = documents()
    rows = [pair[side] for side in (0, 1) for pair in pairs]
    longest = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }
    if margins:
        inputs["margin"] = torch.tensor(MARGINS)
    same = lambda x: x  # noqa: E731
    trainer = SimpleNamespace(
        model=module, args=SimpleNamespace(center_rewards_coefficient=center), _tp_size=1, _total_train_tokens=0,
        accelerator=SimpleNamespace(gather=same, gather_for_metrics=same),
        _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
    )  # fmt: skip
    loss = RewardTrainer.compute_loss(trainer, module, inputs)
    module.zero_grad()
    loss.backward()
    values = {name: value[-1] for name, value in trainer._metrics["eval"].items() if name != "num_tokens"}
    gradients = {name: p.grad.numpy() for name, p in module.named_parameters() if name in GRADIENTS}
    return {"loss": loss.item(), **values} | {f"gradient/{name}": value for name, value in gradients.items()}


def main() -> None:
    """Writes the file."""
    module = model()
    config = json.loads(module.config.to_json_string())
    config["architectures"] = ["LlamaForSequenceClassification"]
    out = {"versions": json.dumps({"trl": trl.__version__, "transformers": transformers.__version__})}
    out |= {"config": json.dumps(config), "pairs": json.dumps(documents()), "margins": np.array(MARGINS, np.float32)}
    out |= {f"weights/{name}": p.detach().numpy() for name, p in module.named_parameters()}
    for variant, settings in VARIANTS.items():
        out |= {f"{variant}/{name}": np.float32(value) for name, value in by_trl(module, **settings).items()}
    np.savez_compressed(Path(__file__).with_suffix("").with_name("reward.npz"), **out)


if __name__ == "__main__":
    main()
