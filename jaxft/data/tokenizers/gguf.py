"""The tokenizer inside a GGUF file, rebuilt with the `tokenizers` library.

transformers' own conversion drops the pre-tokenizer that the file names, so that numbers are split
otherwise than in training. This one builds the pre-tokenizer of the original `tokenizer.json`, by its
name, and refuses names that it does not know.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from jaxft.errors import CheckpointError, ModelError, did_you_mean
from jaxft.files.gguf.header import CONTROL, GGUFHeader, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, USER_DEFINED, UNUSED, BYTE = 1, 2, 4, 5, 6

ELSEWHERE = (
    "Take the tokenizer from the model's original folder: --config.model.tokenizer=FOLDER trains with it, and `jaxft "
    "convert FILE.gguf NEW_FOLDER --tokenizer=FOLDER` writes a folder that every command reads."
)
_DIGIT = r"\p{N}"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen 3.5: as Qwen 2, but combining marks belong to words.
_MARKS_IN_WORDS = (_CASED % "").replace(r"\p{L}+", r"[\p{L}\p{M}]+", 1).replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
_SEED_CODER = (_CASED % "").replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
_HEAD, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMEL = (
    f"{_HEAD}{_UPPER}*{_LOWER}+%(tail)s|{_HEAD}{_UPPER}+{_LOWER}*%(tail)s|"
    r"\p{N}%(digits)s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"


@dataclass(frozen=True, kw_only=True)
class _PreTokenizer:
    """How text is split before byte-pair merges: each pattern splits the pieces of the previous one."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is itself a token is never assembled from merges
    add_bos: bool = False  # if the file does not say
    nfc: bool = False


# DeepSeek: words behind one mark or symbol; Chinese and Japanese characters are pieces of their own.
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_EAST_ASIAN = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_MARKED = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2 = _PreTokenizer(patterns=(WORDS,))
_DIGITS = _PreTokenizer(patterns=(_DIGIT, WORDS))
_LLAMA3 = _PreTokenizer(patterns=(_CASED % "{1,3}",), ignore_merges=True, add_bos=True)
_QWEN2 = _PreTokenizer(patterns=(_CASED % "",), nfc=True)
_GPT4O = _PreTokenizer(patterns=(_CAMEL % {"tail": _CONTRACTIONS, "digits": "{1,3}"},))

# Source: the tokenizer.json files of the models that llama.cpp's converter gave these names.
PRE_TOKENIZERS = {
    **dict.fromkeys(
        ("gpt-2", "phi-2", "olmo", "mpt", "gigachat", "a.x-4.0", "mellum", "trillion", "exaone4", "jais"), _GPT2
    ),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "midm-2.0", "lfm2"), _LLAMA3),
    # DeepSeek's distillations of Qwen have Qwen's vocabulary with other special tokens.
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "qwen35": _PreTokenizer(patterns=(_MARKS_IN_WORDS,)),
    "command-r": _PreTokenizer(patterns=(_DIGIT, WORDS), nfc=True, add_bos=True),
    "dbrx": _PreTokenizer(patterns=(_CASED % "{1,3}",)),
    "tekken": _PreTokenizer(patterns=(_CAMEL % {"tail": "", "digits": ""},), ignore_merges=True, add_bos=True),
    "deepseek-v3": _PreTokenizer(patterns=(r"\p{N}{1,3}", _CJK, _MARKED)),
    "deepseek-coder": _PreTokenizer(patterns=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}")),
    "deepseek-llm": _PreTokenizer(
        patterns=(
            r"[\r\n]",
            r"\s?[\p{Lu}\p{Ll}\p{Lt}]+",
            r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _EAST_ASIAN,
            r"\p{N}+",
        )
    ),
    "seed-coder": _PreTokenizer(patterns=(_SEED_CODER,)),
    "minicpm5": _PreTokenizer(patterns=(r"\p{N}{1,3}", _CASED % "+"), ignore_merges=True),
    "default": _PreTokenizer(patterns=(r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]")),
}


@dataclass(frozen=True, kw_only=True)
class _Vocab:
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]

    def of_type(self, *types: int) -> list[str]:
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in types]


def tokenizer_from_gguf(path: str | os.PathLike[str]) -> tuple["PreTrainedTokenizerFast", list[int]]:
    """The tokenizer of a GGUF file, with its special tokens, BOS rule and (default) chat template; and its stop ids.

    Kinds: byte-level BPE (`gpt2`) with a known `tokenizer.ggml.pre`, and SentencePiece BPE (`llama`).
    `save_pretrained` writes files that transformers' AutoTokenizer reloads identically.
    Raises CheckpointError for a damaged file, and ModelError for an unknown kind or pre-tokenizer: a similar one would
    silently split text otherwise than in training.
    """
    from transformers import PreTrainedTokenizerFast

    header = read_header(path)
    vocab = _vocab(header)
    kinds = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    kind = header.require("tokenizer.ggml.model")
    if kind not in kinds:
        raise ModelError(f"{header.path}: tokenizer.ggml.model={kind!r} is not one of {', '.join(kinds)}. {ELSEWHERE}")
    tokenizer, add_bos = kinds[kind](header, vocab)
    controls = dict.fromkeys([*vocab.of_type(CONTROL), *_unknown(header, vocab)])
    special = [AddedToken(t, special=True, normalized=False) for t in sorted(controls, key=vocab.ids.__getitem__)]
    plain = [AddedToken(t, special=False, normalized=False) for t in vocab.of_type(USER_DEFINED)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    named = _named_tokens(header, vocab)
    _add_bos_and_eos(tokenizer, header, named, add_bos)
    length = header.metadata.get(f"{header.require('general.architecture')}.context_length")
    backend = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=_templates(header),
        clean_up_tokenization_spaces=False,
        **({} if length is None else {"model_max_length": length}),
        **named,
    )
    return backend, _stop_ids(header, vocab)


def _vocab(header: GGUFHeader) -> _Vocab:
    tokens = header.require("tokenizer.ggml.tokens")
    types = header.metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(f"{header.path}: {len(types)} token types for {len(tokens)} tokens")
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise CheckpointError(f"{header.path}: token {twice!r} is in the vocabulary twice")
    return _Vocab(tokens=tokens, types=[int(kind) for kind in types], ids=ids)


def _templates(header: GGUFHeader) -> Any:
    """The chat template; a dict by name if there is more than one, as in transformers; None if there is none."""
    default = header.metadata.get("tokenizer.chat_template")
    names = header.metadata.get("tokenizer.chat_templates", [])
    others = {name: header.require(f"tokenizer.chat_template.{name}") for name in names if name != "default"}
    return {**({} if default is None else {"default": default}), **others} if others else default


def _named_tokens(header: GGUFHeader, vocab: _Vocab) -> dict[str, str]:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    named = {}
    for key, name in names.items():
        token_id = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is None:
            continue
        if not 0 <= token_id < len(vocab.tokens):
            raise CheckpointError(f"{header.path}: {key} token id {token_id} is outside {len(vocab.tokens)} tokens")
        named[name] = vocab.tokens[token_id]
    return named


def _unknown(header: GGUFHeader, vocab: _Vocab) -> list[str]:
    """The token for unknown text: the one that the file names, else those of this type.

    In Gemma's files it has the type of a control token. In older files of Phi-3, rows of padding have this type too.
    """
    named = _named_tokens(header, vocab).get("unk_token")
    return vocab.of_type(UNKNOWN) if named is None else [named]


def _stop_ids(header: GGUFHeader, vocab: _Vocab) -> list[int]:
    stops = sorted(header.stop_ids())
    if stops and stops[-1] >= len(vocab.tokens):
        raise CheckpointError(f"{header.path}: stop token id {stops[-1]} is outside {len(vocab.tokens)} tokens")
    return stops


def _byte_level_bpe(header: GGUFHeader, vocab: _Vocab) -> tuple[Tokenizer, bool]:
    name = header.metadata.get("tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        hint = did_you_mean(name, PRE_TOKENIZERS) if name else ""
        raise ModelError(
            f"{header.path}: the pre-tokenizer tokenizer.ggml.pre={name!r} is not known.{hint} Known: "
            f"{', '.join(PRE_TOKENIZERS)}. {ELSEWHERE}"
        )
    pre = PRE_TOKENIZERS[name]
    merges = [tuple(line.split(" ")) for line in header.require("tokenizer.ggml.merges")]
    for rank, merge in enumerate(merges):
        if len(merge) != 2 or not (merge[0] in vocab.ids and merge[1] in vocab.ids and "".join(merge) in vocab.ids):
            raise CheckpointError(
                f"{header.path}: merge {rank}, {' '.join(merge)!r}, is not two tokens that make a third"
            )
    tokenizer = Tokenizer(models.BPE(vocab=vocab.ids, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece_bpe(header: GGUFHeader, vocab: _Vocab) -> tuple[Tokenizer, bool]:
    if header.metadata.get("tokenizer.ggml.remove_extra_whitespaces", False):
        raise ModelError(
            f"{header.path}: tokenizer.ggml.remove_extra_whitespaces is set, which is not supported. {ELSEWHERE}"
        )
    unknown = _unknown(header, vocab)
    if len(unknown) != 1:
        raise CheckpointError(f"{header.path}: {len(unknown)} tokens of the type unknown; SentencePiece has one")
    scores = header.require("tokenizer.ggml.scores")
    if len(scores) != len(vocab.tokens):
        raise CheckpointError(f"{header.path}: {len(scores)} scores for {len(vocab.tokens)} tokens")
    merges = _merges_from_scores(vocab, scores)
    bpe = models.BPE(vocab=vocab.ids, merges=merges, unk_token=unknown[0], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    undo: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer, True


def _merges_from_scores(vocab: _Vocab, scores: Sequence[float]) -> list[tuple[str, str]]:
    """All pairs of normal pieces that join to another one, best score first, as SentencePiece merges them."""
    pieces = {token: vocab.ids[token] for token in vocab.of_type(NORMAL)}
    merges = []
    for piece, i in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append((-float(scores[i]), pieces[left], pieces[right], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_bos_and_eos(tokenizer: Tokenizer, header: GGUFHeader, named: Mapping[str, Any], add_bos: bool) -> None:
    """Adds BOS before and EOS after each text, as the file says, or else by the convention of the tokenizer's kind."""
    wanted = {
        "bos_token": header.metadata.get("tokenizer.ggml.add_bos_token", add_bos),
        "eos_token": header.metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    for name, add in wanted.items():
        if add and name not in named:
            raise CheckpointError(f"{header.path}: every text should get a {name}, but the file names none")
    before = [named["bos_token"]] if wanted["bos_token"] else []
    after = [named["eos_token"]] if wanted["eos_token"] else []
    if before or after:
        second = [f"{part}:1" for part in (*before, "$B", *after)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *second],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in {*before, *after}],
        )
