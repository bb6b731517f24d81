"""GGUF metadata of a tokenizer: vocabulary, merges or scores, special tokens, chat template.

llama.cpp splits text by its own code, chosen by the name in `tokenizer.ggml.pre`. So the name is determined by
comparing the tokenizer's patterns with those of every known name, and similar ones are refused.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxft.data.tokenizers.gguf import BYTE, NORMAL, PRE_TOKENIZERS, UNKNOWN, UNUSED, USER_DEFINED, WORDS
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import ExportError
from jaxft.files.gguf.header import CONTROL, ENDS

PROBES = (
    "Hello, world!", "  two  spaces", "tabs\tand\nlines\n\n", "naïve 漢字 ☃ 🙂", "x1234567 = 3.14;", "it's I'LL we'd",
    "def f(a):\n    return a**2  # why?\r\n", "ÀÉÎ straße ½ ٣٤٥", "",
)  # fmt: skip


def tokenizer_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Metadata under `tokenizer.` for a GGUF file whose embedding has `vocab_size` rows.

    For byte-level BPE and SentencePiece BPE. Raises ExportError for another kind, an unknown way to split text,
    tokens beyond the embedding, or a stop token at which llama.cpp would not stop.
    """
    content = json.loads(tokenizer.backend.backend_tokenizer.to_str())
    model = content["model"]
    if model["type"] != "BPE":
        raise ExportError(f"the tokenizer {tokenizer.name} is {model['type']}; GGUF is written for BPE only")
    if tokenizer.vocab_size > vocab_size:
        raise ExportError(f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding {vocab_size} rows")
    tokens, types = _vocabulary(content, vocab_size)
    ends_with_eos = tokenizer.eos_id is not None and tokenizer.backend("a")["input_ids"][-1:] == [tokenizer.eos_id]
    common = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": tokenizer.adds_bos,
        "tokenizer.ggml.add_eos_token": ends_with_eos,
    }
    kind = _sentencepiece(content, tokens) if model.get("byte_fallback") else _byte_level(content, tokenizer.name)
    return common | kind | _special_ids(tokenizer, model) | _templates(tokenizer)


def check_tokenizer(path: str, tokenizer: Tokenizer) -> None:
    """Reads the tokenizer of a written GGUF file back and compares ids of difficult texts and special tokens.

    Raises ExportError for the first difference.
    """
    back = load_tokenizer(path)
    pre = json.loads(tokenizer.backend.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    for text in PROBES:
        if pre.get("type") == "Metaspace":
            # Metaspace takes a leading space for the prefix; SentencePiece itself and llama.cpp add another one.
            text = text.lstrip(" ")
        wanted, got = (t.encode(text, add_special_tokens=True) for t in (tokenizer, back))
        if wanted != got:
            raise ExportError(f"{path}: its tokenizer makes {got} of {text!r}, the original {wanted}. Do not use it.")
    for name in ("bos_id", "eos_id", "chat_templates"):
        if getattr(back, name) != getattr(tokenizer, name):
            raise ExportError(f"{path}: {name} reads back as {getattr(back, name)!r}. Do not use the file.")


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    """The default template, and others under their names: llama.cpp looks for `tool_use`."""
    others = {name: text for name, text in tokenizer.chat_templates.items() if name != "default"}
    out: dict[str, Any] = {f"tokenizer.chat_template.{name}": text for name, text in others.items()}
    if others:
        out["tokenizer.chat_templates"] = list(others)
    return out | ({} if tokenizer.chat_template is None else {"tokenizer.chat_template": tokenizer.chat_template})


def _vocabulary(content: Mapping[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Token and type of every row of the embedding; rows without a token get a placeholder."""
    model = content["model"]
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, i in model["vocab"].items():
        is_byte = model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        tokens[i], types[i] = token, BYTE if is_byte else NORMAL
    for added in content["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise ExportError(f"token {added['content']!r} takes the spaces around it, which GGUF cannot express")
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if model.get("byte_fallback") and not added["special"]:
            # Gemma's runs of spaces: llama.cpp looks for these tokens before it turns spaces into ▁.
            tokens[added["id"]] = added["content"].replace("▁", " ")
    if model.get("byte_fallback") and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    return tokens, types


def _byte_level(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    model, normalizer = content["model"], content["normalizer"]
    if not model["merges"]:
        raise ExportError(f"the tokenizer {name} has no merges, and llama.cpp loads no tokenizer without them")
    patterns = _patterns(content["pre_tokenizer"])
    nfc = (normalizer or {}).get("type") == "NFC"
    plain = not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"))
    for pre, known in PRE_TOKENIZERS.items():
        same = (known.patterns, known.nfc, known.ignore_merges) == (patterns, nfc, bool(model.get("ignore_merges")))
        if same and plain and (nfc or normalizer is None):
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.merges": merges}
    raise ExportError(
        f"the tokenizer {name} splits text in a way for which jaxft knows no GGUF name (pre_tokenizer "
        f"{json.dumps(content['pre_tokenizer'])[:300]}, normalizer {json.dumps(normalizer)[:100]}, ignore_merges "
        f"{model.get('ignore_merges')}). llama.cpp would split it otherwise than in training."
    )


def _patterns(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """The patterns by which a byte-level tokenizer splits text, in order; None for another kind."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *before, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    patterns = [_pattern(part) for part in before] + ([WORDS] if last.get("use_regex", True) else [])
    known = tuple(pattern for pattern in patterns if pattern is not None)
    return known if len(known) == len(patterns) else None


def _pattern(part: Mapping[str, Any]) -> str | None:
    if part["type"] == "Digits":
        return r"\p{N}" if part["individual_digits"] else r"\p{N}+"
    # For a pattern that matches all text, both ways give the same pieces.
    ways = (("Isolated", False), ("Removed", True))
    if part["type"] == "Split" and (part["behavior"], part["invert"]) in ways:
        return part["pattern"].get("Regex")
    return None


def _sentencepiece(content: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, Any]:
    model, prefix = content["model"], _space_prefix(content)
    if prefix is None or model.get("ignore_merges"):
        raise ExportError(
            "the tokenizer has byte fallback but does not turn spaces into ▁ as SentencePiece does (normalizer "
            f"{json.dumps(content['normalizer'])[:200]}, pre_tokenizer {json.dumps(content['pre_tokenizer'])[:200]})"
        )
    # SentencePiece merges the pair whose result has the best score; merges are in that order.
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    never = -float(len(model["merges"]) + 1)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [-float(ranks[token]) if token in ranks else never for token in tokens],
        "tokenizer.ggml.add_space_prefix": prefix,
    }


def _space_prefix(content: Mapping[str, Any]) -> bool | None:
    """Whether each text gets a leading space; None if spaces are not treated as in SentencePiece."""
    normalizer, pre = content["normalizer"] or {}, content["pre_tokenizer"] or {}
    steps = normalizer["normalizers"] if normalizer.get("type") == "Sequence" else [normalizer] * bool(normalizer)
    kinds = [(s["type"], s.get("prepend") or (s.get("pattern") or {}).get("String"), s.get("content")) for s in steps]
    replace, prepend = ("Replace", " ", "▁"), ("Prepend", "▁", None)
    if pre.get("type") == "Metaspace" and not kinds and pre["replacement"] == "▁" and not pre.get("split", True):
        return pre["prepend_scheme"] in ("first", "always")
    # Gemma's split at spaces does nothing: they are ▁ by then.
    if pre and not (pre.get("type") == "Split" and pre["pattern"] == {"String": " "}):
        return None
    forms: dict[tuple[Any, ...], bool] = {(prepend, replace): True, (replace,): False}
    return forms.get(tuple(kinds))


def _special_ids(tokenizer: Tokenizer, model: Mapping[str, Any]) -> dict[str, int]:
    unknown = model["vocab"].get(model.get("unk_token"))
    pad = tokenizer.backend.pad_token_id
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": unknown, "padding": pad}
    spelt = {i: tokenizer.token(i) for i in sorted(tokenizer.stop_ids - {tokenizer.eos_id})}
    ids["eom"] = next((i for i, token in spelt.items() if token == "<|eom_id|>"), None)
    rest = {i: token for i, token in spelt.items() if i != ids["eom"]}
    # The only field for another end token is meant for one that llama.cpp does not recognize by itself.
    ids["eot"] = next(iter(sorted(rest, key=lambda i: rest[i] in ENDS)), None)
    lost = [token for i, token in rest.items() if i != ids["eot"] and token not in ENDS]
    if lost:
        raise ExportError(
            f"answers end at {', '.join(spelt.values())}, but GGUF has no field for {', '.join(lost)}: llama.cpp would "
            "continue after it. Leave it out of eos_token_id in config.json and generation_config.json."
        )
    return {f"tokenizer.ggml.{name}_token_id": int(i) for name, i in ids.items() if i is not None}
