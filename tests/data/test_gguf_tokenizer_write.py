"""Tokenizers into GGUF metadata: every known way to cut text keeps its name, and near misses are refused."""

import gguf
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from jaxft.data.tokenizers.gguf import PRE_TOKENIZERS
from jaxft.data.tokenizers.gguf_write import check_tokenizer, tokenizer_metadata
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.data.tokenizers.tokenizer import Tokenizer as Ours
from jaxft.errors import ExportError

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LLAMA3 = PRE_TOKENIZERS["llama-bpe"].patterns[0]


def byte_level(pre_tokenizer, *, normalizer=None, ignore_merges=False, merges=(("t", "h"), ("th", "e"))) -> Ours:
    vocab = {token: i for i, token in enumerate([*BYTES, *("".join(m) for m in merges)])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges), ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(["<eos>", "<turn>"])
    return Ours(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>"))


def cut(*patterns, behavior="isolated", invert=False):
    splits = [pre_tokenizers.Split(Regex(pattern), behavior, invert=invert) for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def write(path, metadata) -> str:
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return str(path)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_known_way_to_cut_is_found_again(tmp_path, name):
    known = PRE_TOKENIZERS[name]
    nfc = normalizers.NFC() if known.nfc else None
    tokenizer = byte_level(cut(*known.patterns), normalizer=nfc, ignore_merges=known.ignore_merges)
    metadata = tokenizer_metadata(tokenizer, 300)
    assert PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]].patterns == known.patterns
    check_tokenizer(write(tmp_path / "t.gguf", metadata), tokenizer)


@pytest.mark.parametrize(
    ("pre_tokenizer", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            "smollm",
        ),
        (cut(PRE_TOKENIZERS["dbrx"].patterns[0], behavior="removed", invert=True), "dbrx"),
    ],
)
def test_other_spellings_of_the_same_cut_are_recognised(pre_tokenizer, name):
    assert tokenizer_metadata(byte_level(pre_tokenizer), 300)["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(cut(LLAMA3.replace("{1,3}", "{1,2}")), ignore_merges=True),
        byte_level(cut(PRE_TOKENIZERS["qwen2"].patterns[0])),  # without NFC
        byte_level(cut(PRE_TOKENIZERS["tekken"].patterns[0])),  # without ignore_merges
        byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer=normalizers.Lowercase()),
        byte_level(pre_tokenizers.Whitespace()),
    ],
)
def test_near_misses_are_refused(tokenizer):
    with pytest.raises(ExportError, match=r"splits text in a way for which jaxft knows no GGUF name"):
        tokenizer_metadata(tokenizer, 300)


def sentencepiece(prefix="normalizer") -> Ours:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁theinaos", "th", "the", "▁the", "in"]
    merges = [("t", "h"), ("i", "n"), ("th", "e"), ("▁", "the")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        backend.normalizer = (
            normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix == "normalizer" else replace
        )
    backend.decoder = decoders.Sequence(undo if prefix == "none" else [*undo, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)])
    return Ours(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"))


@pytest.mark.parametrize("prefix", ["normalizer", "metaspace", "none"])
def test_sentencepiece_goes_through_scores_and_back(tmp_path, prefix):
    tokenizer = sentencepiece(prefix)
    metadata = tokenizer_metadata(tokenizer, 280)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] == (prefix != "none")
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    check_tokenizer(write(tmp_path / "t.gguf", metadata), tokenizer)


def test_runs_of_spaces_are_found_in_text_as_they_stand_there(tmp_path):
    from tokenizers import AddedToken

    tokenizer = sentencepiece("none")
    tokenizer.backend.add_tokens([AddedToken("▁▁", normalized=True), AddedToken("<b>", normalized=False)])
    metadata = tokenizer_metadata(Ours(tokenizer.backend), 280)
    assert metadata["tokenizer.ggml.tokens"][272:274] == ["  ", "<b>"]
    assert metadata["tokenizer.ggml.token_type"][272:274] == [4, 4]
    check_tokenizer(write(tmp_path / "t.gguf", metadata), tokenizer)


def test_rows_without_a_token_are_fillers_and_missing_rows_are_refused():
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    metadata = tokenizer_metadata(tokenizer, 262)
    assert metadata["tokenizer.ggml.tokens"][-2:] == ["[PAD260]", "[PAD261]"]
    assert metadata["tokenizer.ggml.token_type"][-3:] == [3, 5, 5]
    with pytest.raises(ExportError, match=r"has 260 tokens, the embedding 259 rows"):
        tokenizer_metadata(tokenizer, 259)


def test_every_stop_token_finds_a_place_or_is_refused():
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.stop_ids = frozenset({258, 259})
    metadata = tokenizer_metadata(tokenizer, 300)
    assert metadata["tokenizer.ggml.eos_token_id"] == 258 and metadata["tokenizer.ggml.eot_token_id"] == 259
    tokenizer.stop_ids = frozenset({258, 259, 5})
    with pytest.raises(ExportError, match=r"GGUF has no field for <turn>"):
        tokenizer_metadata(tokenizer, 300)


def test_tokens_that_take_spaces_and_other_kinds_are_refused():
    from tokenizers import AddedToken

    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.backend.add_tokens([AddedToken("<greedy>", rstrip=True)])
    with pytest.raises(ExportError, match=r"'<greedy>' takes the spaces around it"):
        tokenizer_metadata(tokenizer, 300)
    words = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(ExportError, match=r"is WordLevel; GGUF is written for BPE only"):
        tokenizer_metadata(Ours(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")), 300)


def test_a_file_whose_tokenizer_differs_is_refused(tmp_path):
    digits = (("1", "2"), ("12", "3"), ("123", "4"))
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), merges=digits)
    metadata = tokenizer_metadata(tokenizer, 300) | {"tokenizer.ggml.pre": "dbrx"}
    with pytest.raises(ExportError, match=r"its tokenizer makes .* of 'x1234567"):
        check_tokenizer(write(tmp_path / "t.gguf", metadata), tokenizer)


def test_every_template_travels(tmp_path):
    tokenizer = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    both = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools[0].name }}: {{ messages[0].content }}"}
    tokenizer.backend.chat_template = dict(both)
    path = write(tmp_path / "a.gguf", tokenizer_metadata(tokenizer, 300))
    back = load_tokenizer(path)
    assert back.chat_templates == both and back.chat_template == both["default"]
    check_tokenizer(path, tokenizer)
    messages, tools = [{"role": "user", "content": "q"}], [{"name": "f"}]
    assert [back.render(messages, tools=of) for of in (None, tools)] == ["q", "f: q"]
    tokenizer.save(tmp_path / "folder")
    assert load_tokenizer(tmp_path / "folder").chat_templates == both
    tokenizer.backend.chat_template = both["default"]
    with pytest.raises(ExportError, match="chat_templates reads back as"):
        check_tokenizer(path, tokenizer)
