"""`jaxft lm-eval`: the model class gives lm-evaluation-harness what its own class for transformers gives it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxft import cli
from jaxft.assets import ASSETS
from jaxft.checkpoint import hf
from jaxft.checkpoint.load import load_model, random_model
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ConfigError, DataError
from jaxft.runs.lm_eval import run
from jaxft.runs.lm_eval.answers import sampling_of
from jaxft.runs.quickstart import convert, find_gguf

LOGPROB = 1e-3  # nats of a whole continuation, float32 on both sides
# It is heavy and no part of the suite's environment: pip install 'jaxft[lm-eval]' runs these tests.
needs_harness = pytest.mark.skipif(
    run.importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)
WORDS = "the old road by sea runs past a mill and no one asks why it was cut in two or who paid for its stones".split()


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model that ships with jaxft, with drawn weights, as a folder that transformers reads."""
    path = tmp_path_factory.mktemp("lm-eval") / "model"
    path.mkdir()
    drawn = random_model(str(ASSETS / "smoke"), seed=3, dtype="float32", param_dtype="float32")
    tokenizer = load_tokenizer(str(ASSETS / "smoke"))
    hf.write_weights(drawn.module, str(path))
    hf.write_config(str(path), drawn.hf_config, dtype="float32", generation=tokenizer.generation_config())
    tokenizer.save(path)
    return str(path)


def ours(folder: str, **settings: Any) -> Any:
    from jaxft.runs.lm_eval.model import JaxftLM

    return JaxftLM(load_model(folder), load_tokenizer(folder), **settings)


@pytest.fixture(scope="module")
def theirs() -> Callable[..., Any]:
    """theirs(folder, **settings) -> the harness's model of transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def make(folder: str, **settings: Any) -> Any:
        from lm_eval.models.huggingface import HFLM

        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        return HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", **settings)

    return make


def requests_of(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=one, task_name="t") for one in arguments]


def compare(mine: Any, other: Any, context_words: int) -> None:
    """100 requests of every kind, some of them longer than the models read, in a mixed order."""
    rng = random.Random(0)
    pairs = [(words(rng, rng.randrange(1, context_words)), f" {words(rng, rng.randrange(1, 5))}") for _ in range(36)]
    question = words(rng, context_words // 2)
    pairs += [(question, f" {letter}") for letter in "ABCD"] + [("", words(rng, 4)), ("ends in a space ", "so")]
    pairs += [(words(rng, 3 * context_words), f" {letter}") for letter in "AB"] + [("naïve 漢字", " ☃ 🙂")]
    given = requests_of(*rng.sample(pairs * 2, 75))
    expected = other.loglikelihood(given, disable_tqdm=True)
    got = mine.loglikelihood(given, disable_tqdm=True)
    for (total, greedy), (right, is_greedy) in zip(got, expected, strict=True):
        assert total == pytest.approx(right, abs=LOGPROB) and greedy == is_greedy
    texts = [(words(rng, count),) for count in (1, 4, context_words, 2 * context_words, 5 * context_words)]
    got = mine.loglikelihood_rolling(requests_of(*texts), disable_tqdm=True)
    expected = other.loglikelihood_rolling(requests_of(*texts), disable_tqdm=True)
    assert got == pytest.approx(expected, abs=LOGPROB, rel=1e-5)
    settings = [
        {"until": ["\n", "qq"], "max_gen_toks": 12},
        {"until": [" the"], "max_gen_toks": 20, "do_sample": False},
    ]
    asked = [(words(rng, rng.randrange(1, 2 * context_words)), settings[i % 2]) for i in range(20)]
    got = mine.generate_until(requests_of(*asked), disable_tqdm=True)
    # One at a time: with padding on the left, the harness truncates a batch as a whole.
    assert got == [text for one in asked for text in other.generate_until(requests_of(one), disable_tqdm=True)]


@needs_harness
def test_a_hundred_requests_have_the_answers_of_transformers(folder: str, theirs: Callable[..., Any]) -> None:
    mine = ours(folder, batch_size=8, max_length=64)
    other = theirs(folder, batch_size=8, max_length=64)
    assert (mine.eot_token_id, mine.prefix_token_id, mine.max_gen_toks) == (
        other.eot_token_id, other.prefix_token_id, other.max_gen_toks,
    )  # fmt: skip
    compare(mine, other, context_words=10)
    greedy = mine.generate_until(requests_of(("the old road", {"until": [], "max_gen_toks": 6})))[0]
    (_, is_greedy), (_, is_not) = mine.loglikelihood(requests_of(("the old road", greedy), ("the old road", "zz!")))
    assert is_greedy and not is_not
    history = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    assert mine.apply_chat_template(history) == other.apply_chat_template(history)
    begun = [*history, {"role": "assistant", "content": "Because"}]
    assert mine.apply_chat_template(begun, False) == other.apply_chat_template(begun, False)
    assert mine.chat_template(True) == other.chat_template(True)
    with pytest.raises(DataError, match="a continuation has .* tokens, and the model reads 64 at most"):
        mine.loglikelihood(requests_of(("a", "b" * 80)))
    with pytest.raises(ConfigError, match="max_gen_toks=64 tokens, which leave no room"):
        mine.generate_until(requests_of(("a", {"until": ["\n"], "max_gen_toks": 64})))


@pytest.mark.slow
@needs_harness
def test_real_weights_have_the_answers_of_transformers(
    tmp_path_factory: pytest.TempPathFactory, theirs: Callable[..., Any]
) -> None:
    try:
        gguf = find_gguf()
    except ConfigError as error:
        pytest.skip(str(error))
    path = tmp_path_factory.mktemp("real") / "hf"
    convert(gguf, path)
    compare(ours(str(path), batch_size=4, max_length=192), theirs(str(path), batch_size=4, max_length=192), 40)


TASKS = {
    "choices": """
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no"]
doc_to_target: label
metric_list: [{{metric: acc}}]
""",
    "written": """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two tasks of our own; the harness's own are not read."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = tmp_path / "rows.jsonl"
    asked = [{"question": f"is {i} even?", "label": i % 2, "answer": "it is"} for i in range(6)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    path = tmp_path / "tasks"
    path.mkdir()
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(text.format(rows=rows))
    return path


@needs_harness
def test_tasks_of_ones_own_run_offline(
    folder: str, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    command = ["lm-eval", f"--model={folder}", f"--include_path={tasks}", "--limit=4", "--num_fewshot=1"]
    more = ["--tasks=choices,written", "--log_samples", f"--output={output}", "--batch_size=2", "--max_length=128"]
    assert cli.main([*command, *more, "--apply_chat_template", "--system=Be brief."]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    results = json.loads(output.read_text())
    assert "choices" in shown and "exact_match" in shown
    assert 0 <= results["results"]["choices"]["acc,none"] <= 1
    assert {name: len(samples) for name, samples in results["samples"].items()} == {"choices": 4, "written": 4}
    asked = results["samples"]["written"][0]["arguments"][0][0]
    assert asked.startswith("<|im_start|>system\nBe brief.") and asked.endswith("<|im_start|>assistant\n")
    assert asked.count("even?") == 2
    assert cli.main([*command, *more]) != 0 and "is there already" in capsys.readouterr().err


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run.check_one_process()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one,two")
    with pytest.raises(ConfigError, match="TPU_WORKER_HOSTNAMES names 2 hosts"):
        run.check_one_process()
    monkeypatch.setattr(run.jax, "process_count", lambda: 4)
    with pytest.raises(ConfigError, match="lm-eval is for one process, .* and not for 4"):
        run.check_one_process()


def test_without_the_harness_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["lm-eval", "--model=nowhere", "--tasks=arc_easy"]) == 2
    assert "pip install 'jaxft[lm-eval]'" in capsys.readouterr().err


def test_settings_of_generation() -> None:
    greedy = sampling_of({"max_gen_toks": 9, "temperature": 0.0, "top_p": 0.5, "until": ["x"], "do_sample": False}, 1)
    assert (greedy.max_new_tokens, greedy.temperature, greedy.top_p) == (9, 0.0, None)
    drawn = sampling_of({"max_gen_toks": 9, "temperature": 0.7, "top_p": 0.5, "top_k": 0, "do_sample": True}, 1)
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.seed) == (0.7, 0.5, None, 1)
    assert sampling_of({"max_gen_toks": 9, "num_beams": 1}, 0).max_new_tokens == 9
    with pytest.raises(ConfigError, match="sets num_beams=4 for generation, which jaxft does not have"):
        sampling_of({"max_gen_toks": 9, "num_beams": 4}, 0)
