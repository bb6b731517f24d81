"""Tokenizers from every kind of path, their end tokens, and their way back to disk."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from transformers import AutoTokenizer

from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import CheckpointError, DataError, ModelError

TEXTS = ["Hello there", "  two  spaces\n\n", "naïve 漢字 ☃", "<s>a</s> b", '{"a": 1}']
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def folder_of(tokenizer_of, tmp_path):
    def save(name, place="model"):
        tokenizer_of(name).save(tmp_path / place)
        return tmp_path / place

    return save


@pytest.mark.parametrize("name", ["chatml", "llama3", "llama2", "phi3", "plain"])
def test_saved_folder_is_read_back_by_us_and_by_transformers(name, tokenizer_of, folder_of):
    live, folder = tokenizer_of(name), folder_of(name)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False) == live.encode(text)
        with_specials = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=True) == with_specials
    assert ours.chat_template == theirs.chat_template == live.chat_template
    for field in ("vocab_size", "bos_id", "eos_id", "pad_id", "stop_ids", "adds_bos"):
        assert getattr(ours, field) == getattr(live, field), field


def test_save_names_its_files(tokenizer_of, tmp_path):
    assert tokenizer_of("chatml").save(tmp_path) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert tokenizer_of("plain").save(tmp_path / "new") == ["tokenizer.json", "tokenizer_config.json"]


def test_text_round_trip(tokenizer_of):
    tokenizer = tokenizer_of("chatml")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    ids = tokenizer.encode("<|im_start|>Hi<|im_end|>")
    assert tokenizer.decode(ids) == "Hi"
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(t) for t in TEXTS]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("chatml", {"<|im_end|>"}),
        ("llama3", {"<|eot_id|>", "<|end_of_text|>"}),
        ("llama2", {"</s>"}),
        ("phi3", {"<|end|>", "<|endoftext|>"}),
        ("plain", {"</s>"}),
        ("endless", set()),
    ],
)
def test_stop_ids(name, ends, tokenizer_of):
    tokenizer = tokenizer_of(name)
    assert {tokenizer.token(i) for i in tokenizer.stop_ids} == ends


def test_generation_config_adds_stop_ids(folder_of):
    folder = folder_of("llama3")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    assert load_tokenizer(folder).stop_ids == {1, 3, 4}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert load_tokenizer(folder).stop_ids == {1, 2, 4}


def test_facts(tokenizer_of):
    tokenizer = tokenizer_of("plain")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.adds_bos) == (0, 1, 1, True)
    assert tokenizer.vocab_size == len(tokenizer.backend)
    assert tokenizer_of("endless").eos_id is None and tokenizer_of("endless").pad_id == 0
    assert tokenizer_of("chatml").bos_id is None and not tokenizer_of("chatml").adds_bos


def test_another_chat_template(folder_of, tmp_path):
    folder = folder_of("plain")
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    for template in (str(file), file.read_text()):
        tokenizer = load_tokenizer(folder, chat_template=template)
        assert tokenizer.render(CHAT) == "Hi</s>Hello</s>"
    with pytest.raises(ModelError, match=r"cannot read the chat template .*No such file"):
        load_tokenizer(folder, chat_template=str(tmp_path / "absent.jinja"))
    with pytest.raises(DataError, match=r"has no chat template"):
        load_tokenizer(folder).render(CHAT)


def test_render_is_that_of_transformers(tokenizer_of):
    tokenizer = tokenizer_of("llama3")
    for prompt in (True, False):
        theirs = tokenizer.backend.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.render(CHAT, add_generation_prompt=prompt) == theirs
    variable = tokenizer_of("chatml", "{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert variable.render(CHAT, mood="glad ") == "glad HiHello"


def test_run_and_adapter_folders(folder_of, tmp_path):
    base = folder_of("chatml", "base")
    expected = load_tokenizer(base).encode("Hello there")
    run = tmp_path / "run"
    shutil.copytree(base, run / "adapter")
    (run / "config.json").write_text(json.dumps({"model": {"path": "nowhere"}}))
    assert load_tokenizer(run).encode("Hello there") == expected
    shutil.rmtree(run / "adapter")
    (run / "config.json").write_text(json.dumps({"model": {"path": str(base)}}))
    assert load_tokenizer(run).encode("Hello there") == expected
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert load_tokenizer(adapter).encode("Hello there") == expected
    assert load_tokenizer(base / "tokenizer.json").encode("Hello there") == expected


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def sentencepiece_model(request, tmp_path_factory):
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp(request.param)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(f"The {i} quick brown foxes jump over {i * 7} lazy dogs, naïve." for i in range(200)))
    spm.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), vocab_size=360, model_type=request.param,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


def test_sentencepiece_files(sentencepiece_model, tmp_path):
    import sentencepiece

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    for path in (sentencepiece_model, tmp_path):
        tokenizer = load_tokenizer(path)
        for text in ["The 12 foxes", "  two  spaces", "a\n\nb\t", "naïve 漢字 ☃", " lead", ""]:
            assert tokenizer.encode(text) == oracle.EncodeAsIds(text)
            assert tokenizer.decode(oracle.EncodeAsIds(text)) == oracle.DecodeIds(oracle.EncodeAsIds(text))
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, True)
        assert tokenizer.stop_ids == {2}
    tokenizer.save(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").encode(" lead x") == oracle.EncodeAsIds(" lead x")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert not load_tokenizer(tmp_path).adds_bos


def test_not_sentencepiece(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ModelError, match=r"not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_gguf(smollm2_path):
    tokenizer = load_tokenizer(smollm2_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    assert tokenizer.stop_ids == {0, 2}  # the file's eos, and <|endoftext|>, which llama.cpp knows by its spelling
    assert "<|im_start|>" in tokenizer.chat_template


def test_refusals(folder_of, tmp_path):
    with pytest.raises(ModelError, match=r"neither a folder nor"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"no tokenizer in .* contains model.safetensors"):
        load_tokenizer(tmp_path / "empty")
    folder = folder_of("plain")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["code.Mine", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"needs Python code from its own folder"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json is not valid JSON"):
        load_tokenizer(folder)


def test_a_tokenizer_that_fails_on_unknown_text_is_refused(folder_of):
    folder = folder_of("plain")
    own = json.loads((folder / "tokenizer.json").read_text())
    own["model"] |= {"unk_token": "not there", "vocab": {"a": 0}, "merges": []}
    own |= {"added_tokens": [], "pre_tokenizer": None, "normalizer": None, "post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(own))
    with pytest.raises(ModelError, match="not there"):
        load_tokenizer(folder)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("content", [b"{}", b"\xff", b"[" * 10000])
def test_damaged_tokenizer_json(plain, content, folder_of):
    folder = folder_of("plain")
    (folder / "tokenizer.json").write_bytes(content)
    if not plain:
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"cannot load the tokenizer"):
        load_tokenizer(folder)


def test_folder_with_tokenizer_json_alone(tokenizer_of, folder_of):
    folder = folder_of("chatml")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode(TEXTS[0]) == tokenizer_of("chatml").encode(TEXTS[0]) and tokenizer.chat_template is None


def test_plain_folder_is_read_without_torch(folder_of):
    program = f"import sys; from jaxft.data import load_tokenizer; load_tokenizer({str(folder_of('chatml'))!r}); "
    program += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).resolve().parents[2])


def test_tokenizer_json_wins_over_the_class(folder_of, tmp_path):
    # GPT-2's class splits text in its own way, whatever the file says.
    folder = folder_of("llama3")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    file, ours = RustTokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
    text = "Hello there.\n\nHow are you"
    assert ours.encode(text) == file.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) != AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)
    ours.save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(text, add_special_tokens=False) == ours.encode(text)


def test_what_is_saved_is_in_words_that_transformers_4_knows_too(folder_of, tmp_path):
    ours = load_tokenizer(folder_of("chatml"))
    ours.backend.add_special_tokens({"additional_special_tokens": ["<tool>", "<über>"]})
    ours.backend.save_pretrained(tmp_path / "new")
    ours.save(tmp_path / "out")
    words = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert words["additional_special_tokens"] == ["<tool>", "<über>"] and "extra_special_tokens" not in words
    new, out = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("new", "out"))
    assert type(new) is type(out) and new.chat_template == out.chat_template
    assert new.special_tokens_map == out.special_tokens_map and new.extra_special_tokens == out.extra_special_tokens
    assert new.all_special_ids == out.all_special_ids and new.get_vocab() == out.get_vocab()
    for text in (*TEXTS, "a <tool> b<über>"):
        assert new(text) == out(text)


def test_a_class_that_is_not_the_plain_one_keeps_its_name(folder_of, tmp_path):
    ours = load_tokenizer(folder_of("chatml"))
    named = type("QwenTokenizerFast", (type(ours.backend),), {})
    ours.backend.__class__ = named
    ours.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "QwenTokenizerFast"


def test_class_names_the_end_where_settings_do_not(tokenizer_of, folder_of):
    folder = folder_of("chatml")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    ours = load_tokenizer(folder)
    assert ours.token(ours.eos_id) == ours.token(ours.bos_id) == "<|endoftext|>"
    assert ours.vocab_size == tokenizer_of("chatml").vocab_size


def test_hub_name_offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"cannot get a tokenizer from 'hf://nobody/nothing'.*cache"):
        load_tokenizer("hf://nobody/nothing", revision="main")


@pytest.mark.parametrize(
    "content", ['{"a":' * 100_000, "[1]", '{"version": "1.0"}', '{"model": {"type": "BPE"', "null"]
)
def test_a_damaged_tokenizer_file_is_refused_whatever_is_wrong_with_it(folder_of, content):
    folder = folder_of("plain")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of .* Take its files again"):
        load_tokenizer(folder)
