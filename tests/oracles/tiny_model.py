"""A tiny Llama and rows for it, drawn by numpy alone: what oracles record and what tests read back is the same."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 48, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "torch_dtype": "float32",
}  # fmt: skip
# Parameters whose gradients are recorded: below all layers, within them, and above.
RECORDED = ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight")


def shapes():
    """The shape of every tensor, by its name in Hugging Face's folders."""
    hidden, inner, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    heads, kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
    out = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        out |= {
            f"{at}.self_attn.q_proj.weight": (heads * CONFIG["head_dim"], hidden),
            f"{at}.self_attn.k_proj.weight": (kv_heads * CONFIG["head_dim"], hidden),
            f"{at}.self_attn.v_proj.weight": (kv_heads * CONFIG["head_dim"], hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, heads * CONFIG["head_dim"]),
            f"{at}.mlp.gate_proj.weight": (inner, hidden),
            f"{at}.mlp.up_proj.weight": (inner, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, inner),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    return out | {"lm_head.weight": (vocab, hidden)}


def weights(moved=0.0):
    """float32 tensors by name, the same in every call; moved: size of a change of each, relative to its spread."""
    rng, other = np.random.default_rng(0), np.random.default_rng(1)
    out = {}
    for name, shape in shapes().items():
        spread, centre = (0.1, 1.0) if len(shape) == 1 else (0.25, 0.0)
        change = moved * spread * other.normal(size=shape)
        out[name] = (centre + spread * rng.normal(size=shape) + change).astype(np.float32)
    return out


def write_folder(folder, moved=0.0):
    """A folder with config.json and model.safetensors."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(moved), folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def torch_model(moved=0.0):
    """The same model by transformers, with plain attention, in float32."""
    import torch
    import transformers

    config = transformers.LlamaConfig(**{key: value for key, value in CONFIG.items() if key != "model_type"})
    config._attn_implementation = "eager"
    model = transformers.LlamaForCausalLM(config).float()
    model.load_state_dict({name: torch.tensor(x) for name, x in weights(moved).items()})
    return model.train()


def pairs(count=3, longest=14):
    """[(prompt, chosen, rejected)]: token ids; the answers have different lengths."""
    rng = np.random.default_rng(2)
    out = []
    for row in range(count):
        prompt = rng.integers(0, CONFIG["vocab_size"], 3 + row)
        lengths = rng.permutation(np.arange(2, longest - len(prompt)))[:2]
        chosen, rejected = (rng.integers(0, CONFIG["vocab_size"], length) for length in lengths)
        out.append((prompt, chosen, rejected))
    return out
