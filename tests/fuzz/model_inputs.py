"""Files of models that were changed at random, and what reads them.

Each function tries its number of inputs, drawn from a fixed seed. It writes a valid folder in the working directory
first, and for each input changes one of its files, reads all of it, and puts the valid file back.
"""

import functools
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from fuzz.changes import as_json, byte_changes, changed_bytes, changed_json, json_changes
from fuzz.limits import one_input
from gguf.constants import GGUFValueType
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxft import assets, models
from jaxft.checkpoint.folders.opening import folder_config, open_weights
from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.load import open_merged
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSource
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.files.gguf.header import read_header
from jaxft.models.tensor_map import tensor_names

SEED = 16
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32, "hidden_size": 32,
    "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": [2, 3],
    "torch_dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False,
}  # fmt: skip
HEADERS = 4096  # bytes at the start of a file that are changed more often than the rest
which_file = st.integers(0, 2**16 - 1)


def inputs(number: int, **strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Decorates a function that tries one input: it is called for `number` of them."""

    def decorate(function: Callable[..., None]) -> Callable[[], None]:
        limits = settings(
            max_examples=number, database=None, deadline=None, suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.shrink),
        )  # fmt: skip
        return seed(SEED)(limits(given(**strategies)(function)))

    return decorate


def draw(shape: tuple[int, ...], scale: float = 0.1) -> np.ndarray:
    return (np.random.default_rng(0).standard_normal(shape) * scale).astype(np.float32)


def llama_tensors() -> dict[str, np.ndarray]:
    table, square, one = (32, 32), (32, 32), (32,)
    layer = {
        "input_layernorm": one, "post_attention_layernorm": one, "self_attn.q_proj": square,
        "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32), "self_attn.o_proj": square,
        "mlp.gate_proj": square, "mlp.up_proj": square, "mlp.down_proj": square,
    }  # fmt: skip
    shapes = {"model.embed_tokens": table, "model.norm": one, "lm_head": table}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": draw(shape) for name, shape in shapes.items()}


def write_model(folder: Path, tensors: Mapping[str, np.ndarray], **fields: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA | fields))
    save_file(dict(tensors), str(folder / "model.safetensors"))
    return folder


def read_all(source: TensorSource) -> None:
    for name in source.specs():
        source.read(name)


def with_header(content: bytes, change: Callable[[Any], Any]) -> bytes:
    """A safetensors file whose header is the changed JSON, with the length that it then has."""
    length = int.from_bytes(content[:8], "little")
    header = as_json(change(json.loads(content[8 : 8 + length])))
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def changed_file(path: Path, content: bytes, how: int, json_ones: Any, byte_ones: Any) -> None:
    """Writes the changed content of a file: its JSON, that of its header, or its bytes."""
    if path.suffix == ".json" and how % 4:
        content = as_json(changed_json(json.loads(content), json_ones))
    elif path.suffix == ".safetensors" and how % 2:
        content = with_header(content, lambda header: changed_json(header, json_ones))
    else:
        content = changed_bytes(content, byte_ones, within=HEADERS if how % 3 else len(content))
    path.write_bytes(content)


class Files:
    """The files of a valid folder, one of which is another for the length of a `with`."""

    def __init__(self, folder: Path, names: tuple[str, ...] = ("*",)) -> None:
        paths = sorted({path for name in names for path in folder.glob(name) if path.is_file()})
        self.contents = {path: path.read_bytes() for path in paths}

    def try_change(self, which: int, how: int, json_ones: Any, byte_ones: Any, read: Callable[[], None]) -> None:
        path = list(self.contents)[which % len(self.contents)]
        changed_file(path, self.contents[path], how, json_ones, byte_ones)
        try:
            with one_input():
                read()
        finally:
            path.write_bytes(self.contents[path])


CHANGE: dict[str, Any] = {"which": which_file, "how": which_file, "json_ones": json_changes, "byte_ones": byte_changes}


@functools.cache
def shards() -> Files:
    folder = write_model(Path("shards"), llama_tensors())
    tensors, where = llama_tensors(), {}
    (folder / "model.safetensors").unlink()
    for part, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
        file = f"model-{part:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, str(folder / file))
        where |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": where})
    )
    return Files(folder, ("model*",))


@inputs(12000, **CHANGE)
def safetensors(which: int, how: int, json_ones: Any, byte_ones: Any) -> None:
    shards().try_change(which, how, json_ones, byte_ones, lambda: read_all(SafetensorsFolder("shards")))


@functools.cache
def whole() -> Files:
    return Files(write_model(Path("whole"), llama_tensors()))


def read_model(path: str) -> None:
    """Everything but the loading onto a device."""
    folder_config(path)
    hf_config, weights, _ = open_weights(path)
    expected = tensor_names(models.config_from_hf(hf_config).tensors(), hf_config["num_hidden_layers"])
    if expected == weights.specs().keys():
        read_all(weights)


@inputs(6000, **CHANGE)
def folders(which: int, how: int, json_ones: Any, byte_ones: Any) -> None:
    whole().try_change(which, how, json_ones, byte_ones, lambda: read_model("whole"))


@functools.cache
def real_configs() -> list[dict[str, Any]]:
    """Those that ship with jaxft, small ones that hold a language model, and one with every setting of generation."""
    folder = Path(assets.__file__).parent / "published"
    configs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    text = next(config for config in configs if config["model_type"] == "gemma3_text")
    nested = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    old = LLAMA | {"rope_theta": 1e4, "temperature": 1.0, "_attn_implementation": "eager", "qkv_bias": False}
    return [*configs, nested, old]


@inputs(12000, which=which_file, changes=json_changes)
def configs(which: int, changes: Any) -> None:
    hf = changed_json(real_configs()[which % len(real_configs())], changes)
    with one_input():
        config = models.config_from_hf(hf)
        if config.num_hidden_layers <= 200 and getattr(config, "num_experts", 0) <= 200:
            config.tensors()
        config.shape(), models.config_from_hf(config.to_hf())


# Quantised folders.
def words(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32)


def float8(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = dict(tensors)
    for name in [name for name in tensors if "proj" in name]:
        out[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
        out[f"{name}_scale_inv"] = np.ones((1, 1), np.float32)
    return out


def four_bits(tensors: Mapping[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    out = {name: value for name, value in tensors.items() if "proj" not in name}
    for name in [name for name in tensors if "proj" in name]:
        rows, columns = tensors[name].shape
        module = name.removesuffix(".weight")
        awq = kind == "awq"
        out[f"{module}.qweight"] = words((columns, rows // 8) if awq else (columns // 8, rows))
        out[f"{module}.qzeros"] = words((1, rows // 8))
        out[f"{module}.scales"] = np.ones((1, rows), np.float16)
        if not awq:
            out[f"{module}.g_idx"] = np.zeros(columns, np.int32)
    return out


QUANTISED: dict[str, tuple[Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]], dict[str, Any]]] = {
    "float8": (float8, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"}),
    "gptq": (lambda tensors: four_bits(tensors, "gptq"), {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "awq": (
        lambda tensors: four_bits(tensors, "awq"),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    ),
    "compressed": (
        float8,
        {
            "quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8}, "format": "float-quantized"}},
        },
    ),
}  # fmt: skip


@functools.cache
def quantised() -> dict[str, Files]:
    return {
        name: Files(write_model(Path(name), change(llama_tensors()), quantization_config=given))
        for name, (change, given) in QUANTISED.items()
    }


@inputs(8000, kind=st.sampled_from(sorted(QUANTISED)), **CHANGE)
def quantised_folders(kind: str, which: int, how: int, json_ones: Any, byte_ones: Any) -> None:
    quantised()[kind].try_change(which, how, json_ones, byte_ones, lambda: read_model(kind))


# GGUF.
KINDS = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
PACKED = {GGUFValueType.BOOL: "<?", GGUFValueType.UINT32: "<I", GGUFValueType.FLOAT32: "<f", GGUFValueType.INT64: "<q"}
TOKENS = ["<unk>", "<s>", "</s>", "<|im_end|>", *(chr(33 + i) for i in range(28))]
METADATA: dict[str, Any] = {
    "general.architecture": "llama", "general.name": "tiny", "llama.context_length": 64, "llama.embedding_length": 32,
    "llama.block_count": 1, "llama.feed_forward_length": 32, "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1, "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 1e4,
    "llama.rope.dimension_count": 16, "llama.vocab_size": 32, "general.file_type": 0, "general.alignment": 32,
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [2, 3, 3, 3, *[1] * 28], "tokenizer.ggml.merges": ["! \"", "# $"],
    "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "llama.rope.scaling.type": "none",
}  # fmt: skip


def in_gguf(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value: Any) -> bytes:
    """A value of the file's metadata with its type; JSON that GGUF has not becomes text."""
    if isinstance(value, list) and value and len({type(one) for one in value}) == 1 and type(value[0]) in KINDS:
        items = [gguf_value(one) for one in value]
        if len({item[:4] for item in items}) == 1:
            kind = struct.pack("<I", GGUFValueType.ARRAY) + items[0][:4] + struct.pack("<Q", len(items))
            return kind + b"".join(item[4:] for item in items)
    if type(value) is int and not 0 <= value < 2**32:
        return struct.pack("<I", GGUFValueType.INT64) + struct.pack("<q", max(-(2**63), min(value, 2**63 - 1)))
    if type(value) not in KINDS or isinstance(value, str):
        return struct.pack("<I", GGUFValueType.STRING) + in_gguf(value if isinstance(value, str) else repr(value)[:99])
    kind = KINDS[type(value)]
    return struct.pack("<I", kind) + struct.pack(PACKED[kind], value if abs(value) < 3e38 else float("inf"))


def gguf_file(metadata: Mapping[str, Any], tensors: list[Any]) -> bytes:
    """tensors: [name, shape from the innermost, type number, offset]"""
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        out += in_gguf(str(key)) + gguf_value(value)
    for tensor in tensors:
        name, shape, kind, offset = tensor if isinstance(tensor, list) and len(tensor) == 4 else ("x", [1], 0, 0)
        sizes = [n if type(n) is int else 1 for n in (shape if isinstance(shape, list) else [])]
        out += in_gguf(str(name)) + struct.pack("<I", len(sizes))
        out += b"".join(struct.pack("<Q", n % 2**64) for n in sizes)
        numbers = [n if type(n) is int else 0 for n in (kind, offset)]
        out += struct.pack("<IQ", numbers[0] % 2**32, numbers[1] % 2**64)
    return out + b"\0" * (-len(out) % 32)


@functools.cache
def gguf_parts() -> tuple[list[Any], bytes]:
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "blk.0.attn_norm", "post_attention_layernorm": "blk.0.ffn_norm", "q_proj": "blk.0.attn_q",
        "k_proj": "blk.0.attn_k", "v_proj": "blk.0.attn_v", "o_proj": "blk.0.attn_output",
        "gate_proj": "blk.0.ffn_gate", "up_proj": "blk.0.ffn_up", "down_proj": "blk.0.ffn_down",
    }  # fmt: skip
    infos: list[Any] = []
    data = b""
    for key, value in llama_tensors().items():
        module = key.removesuffix(".weight")
        name = names.get(module) or names[module.rpartition(".")[2]]
        infos.append([f"{name}.weight", list(value.shape[::-1]), 0, len(data)])
        data += value.tobytes()
    return infos, data


def read_gguf(path: str) -> None:
    read_header(path)
    file = GGUFFile(path)
    file.hf_config(), file.generation_config()
    read_all(file.tensors())


def read_gguf_tokenizer(path: str) -> None:
    load_tokenizer(path).encode("a b 1 <s>")


@inputs(16000, how=which_file, json_ones=json_changes, byte_ones=byte_changes)
def gguf(how: int, json_ones: Any, byte_ones: Any) -> None:
    infos, data = gguf_parts()
    parts = {"metadata": METADATA, "tensors": infos}
    if how % 5 > 1:
        parts = {
            key: changed_json(value, json_ones) if how % 2 == (key == "tensors") else value
            for key, value in parts.items()
        }
    content = gguf_file(parts["metadata"], parts["tensors"]) + data
    if how % 5 < 2:
        content = changed_bytes(content, byte_ones, within=HEADERS if how % 3 else len(content))
    Path("changed.gguf").write_bytes(content)
    with one_input():
        (read_gguf_tokenizer if how % 7 == 0 else read_gguf)("changed.gguf")


# PEFT folders.
def write_adapter(folder: str, config: Mapping[str, Any], halves: Mapping[str, tuple[int, ...]]) -> Files:
    Path(folder).mkdir()
    own = {"base_model_name_or_path": "../whole", "task_type": "CAUSAL_LM", "inference_mode": True} | dict(config)
    Path(folder, "adapter_config.json").write_text(json.dumps(own))
    tensors = {f"base_model.model.{name}": draw(shape) for name, shape in halves.items()}
    save_file(tensors, str(Path(folder, "adapter_model.safetensors")))
    return Files(Path(folder))


Q, TABLE = "model.layers.0.self_attn.q_proj", "model.embed_tokens"


@functools.cache
def adapters() -> dict[str, Files]:
    whole()
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "lora_dropout": 0.0}
    halves = {f"{Q}.lora_A.weight": (2, 32), f"{Q}.lora_B.weight": (32, 2)}
    return {
        "lora": write_adapter("lora", lora | {"rank_pattern": {"q_proj": 2}, "use_rslora": True}, halves),
        "dora": write_adapter("dora", lora | {"use_dora": True}, halves | {f"{Q}.lora_magnitude_vector": (32,)}),
        "saved": write_adapter("saved", lora | {"modules_to_save": ["lm_head"]}, halves | {"lm_head.weight": (32, 32)}),
        "rows": write_adapter(
            "rows", lora | {"trainable_token_indices": [3, 5]},
            halves | {f"{TABLE}.token_adapter.trainable_tokens_delta": (2, 32)},
        ),
        "tokens": write_adapter(
            "tokens", {"peft_type": "TRAINABLE_TOKENS", "token_indices": [3, 5], "target_modules": ["embed_tokens"]},
            {f"{TABLE}.trainable_tokens_delta": (2, 32)},
        ),
        "ia3": write_adapter(
            "ia3", {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []},
            {"model.layers.0.self_attn.k_proj.ia3_l": (16, 1)},
        ),
        "vera": write_adapter(
            "vera", {"peft_type": "VERA", "r": 2, "target_modules": ["q_proj"], "projection_prng_key": 0},
            {f"{Q}.vera_lambda_d": (2,), f"{Q}.vera_lambda_b": (32,), "../vera": (1,)},
        ),
    }  # fmt: skip


def read_merged(path: str) -> None:
    read_all(open_merged(path)[1])


@inputs(12000, kind=st.sampled_from(["lora", "dora", "saved", "rows", "tokens", "ia3", "vera"]), **CHANGE)
def peft_folders(kind: str, which: int, how: int, json_ones: Any, byte_ones: Any) -> None:
    adapters()[kind].try_change(which, how, json_ones, byte_ones, lambda: read_merged(kind))


# Tokenizers, and all small files beside them.
@functools.cache
def tokenizer_folder() -> Files:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds

    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    backend = Tokenizer(kinds.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in TOKENS[:4]])
    folder = Path("tokenizer")
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    small = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
            "pad_token": None, "model_max_length": 64, "add_bos_token": True, "added_tokens_decoder": {
                "3": {"content": "<|im_end|>", "special": True, "lstrip": False, "rstrip": False},
            },
            "chat_template": "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}",
        },
        "generation_config.json": {"eos_token_id": [2, 3], "temperature": 0.6, "pad_token_id": 0},
        "config.json": LLAMA,
        "special_tokens_map.json": {"eos_token": "</s>"},
        "adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "../whole", "r": 2},
    }  # fmt: skip
    for name, value in small.items():
        (folder / name).write_text(json.dumps(value))
    return Files(folder)


def read_tokenizer() -> None:
    tokenizer = load_tokenizer("tokenizer")
    tokenizer.encode("a b 1 <s>"), tokenizer.stop_ids
    if tokenizer.chat_template is not None:
        tokenizer.render([{"role": "user", "content": "a"}], add_generation_prompt=True)


@inputs(4000, **CHANGE)
def tokenizers(which: int, how: int, json_ones: Any, byte_ones: Any) -> None:
    whole(), tokenizer_folder().try_change(which, how, json_ones, byte_ones, read_tokenizer)
