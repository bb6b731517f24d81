"""The identity of a run is what it reads: contents, whatever the paths are called."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest

from jaxft import models
from jaxft.assets import ASSETS
from jaxft.checkpoint import hf
from jaxft.config import load
from jaxft.data.batch import Example
from jaxft.data.encoded.table import table_of
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ConfigError
from jaxft.files import weights_digest as weights
from jaxft.files.weights_digest import weights_digest
from jaxft.runs.identity import contents as identity
from jaxft.runs.identity.record import read_record
from jaxft.runs.train import set_up

ROOT = Path(__file__).parents[2]
ROWS = [{"prompt": f"Colour {n}?", "completion": f" {n} red"} for n in range(8)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model(folder: Path, seed: int = 0) -> str:
    config = json.loads((ASSETS / "smoke" / "config.json").read_text())
    folder.mkdir()
    model = models.random_model(models.config_from_hf(config), dtype="float32", param_dtype="float32", seed=seed)
    hf.write_weights(model, str(folder))
    hf.write_config(str(folder), config, dtype="float32")
    load_tokenizer(ASSETS / "smoke").save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "base")


def write_rows(path: Path, rows=ROWS) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def start(tmp_path, model):
    """Sets a run up as `jaxft train` does before it loads weights; returns its notes. There is a checkpoint of it."""
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)

    def start_one(**overrides) -> tuple[str, ...]:
        settings = {
            "output_dir": str(tmp_path / "run"), "model.path": model, "model.random_init": False,
            "data.train": str(tmp_path / "rows.jsonl"), "data.eval": None, "data.limit": None, "data.max_length": 64,
            "data.chat_template": str(template), "train.batch_size": 8, "train.steps": 20, "eval.metric": None,
            "data.packing": False, "train.eval_every": None, "checkpoint.every": None, "optim.warmup_ratio": None,
        }  # fmt: skip
        return set_up(load(str(ROOT / "configs" / "quickstart.py") + ":smoke", settings | overrides)).notes

    write_rows(tmp_path / "rows.jsonl")
    assert start_one() == ()
    (tmp_path / "run" / "checkpoints" / "8").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "8" / "manifest.json").write_text("{}")
    return start_one


def test_other_spellings_moved_and_renamed_files_go_on(start, tmp_path, model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert start(**{"data.train": "./rows.jsonl"}) == ()
    assert start(**{"data.train": os.path.relpath(tmp_path / "rows.jsonl")}) == ()
    os.rename("rows.jsonl", "renamed.jsonl")
    shutil.copytree(model, tmp_path / "copy of the model")
    os.rename("chat.jinja", "other.jinja")
    moved = {
        "data.train": "renamed.jsonl", "model.path": "./copy of the model/", "data.chat_template": "other.jinja",
        "output_dir": "./run",
    }  # fmt: skip
    assert start(**moved) == ()
    # The same rows in another form of file are the same rows.
    reordered = [dict(reversed(row.items())) for row in ROWS]
    assert start(**{"data.train": write_rows(tmp_path / "reordered.jsonl", reordered),
                    "data.chat_template": "other.jinja"}) == ()  # fmt: skip


def test_other_rows_are_refused_by_name(start, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [*ROWS[:-1], {"prompt": "Colour 7?", "completion": " 7 blue"}])
    with pytest.raises(
        ConfigError, match=r"read other contents:\n  data\.train: the rows.*rows\.jsonl' changed \(was 8"
    ):
        start()
    write_rows(tmp_path / "rows.jsonl", list(reversed(ROWS)))
    with pytest.raises(ConfigError, match="data.train: the rows"):
        start()
    write_rows(tmp_path / "rows.jsonl")
    assert start() == ()


def test_another_base_template_or_tokenizer_is_refused_by_name(start, tmp_path, model):
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match=r"model\.path: the content of '.*other', before '.*base', changed"):
        start(**{"model.path": other})
    (tmp_path / "changed.jinja").write_text(TEMPLATE.replace("user", "human").replace("<|im_end|>\n", "<|im_end|>"))
    with pytest.raises(ConfigError, match="trained with another chat template"):
        start(**{"data.chat_template": str(tmp_path / "changed.jinja")})
    shutil.copytree(model, tmp_path / "stops")
    values = json.loads((tmp_path / "stops" / "generation_config.json").read_text()) if (
        tmp_path / "stops" / "generation_config.json").is_file() else {}  # fmt: skip
    values["eos_token_id"] = [1, 2, 3]
    (tmp_path / "stops" / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="tokenizer: the content"):
        start(**{"model.path": str(tmp_path / "stops")})


def test_held_out_rows_and_settings_of_evaluation_may_change(start, tmp_path):
    held_out = write_rows(tmp_path / "held_out.jsonl", ROWS[:2])
    assert start(**{"data.eval": held_out, "eval.metric": "exact_match", "eval.max_new_tokens": 9}) == (
        "from step 8 on rows are held out",
    )
    write_rows(tmp_path / "held_out.jsonl", ROWS[2:])
    (note,) = start(**{"data.eval": held_out, "eval.batch_size": 7})
    assert "held_out.jsonl" in note and "compared among the steps after it alone" in note
    record = read_record(tmp_path / "run")
    assert record.ranked_after == 8 and [one["step"] for one in record.history] == [8, 8]
    assert start(**{"data.eval": held_out}) == ()


def test_a_run_may_be_longer_but_not_shorter_than_it_is(start, tmp_path):
    (note,) = start(**{"train.steps": 40})
    # Cosine to 0: after 8 steps of 20, and at step 9 of 40.
    cosine = {steps: 1.5e-3 * (1 + np.cos(np.pi * step / steps)) / 2 for step, steps in ((7, 20), (8, 40))}
    assert f"it was {cosine[20]:.3g} at step 8 and is {cosine[40]:.3g} at step 9" in note
    assert start(**{"train.steps": 40}) == ()
    assert start(**{"train.steps": None, "train.epochs": 40.0}) == ()  # of one step each
    assert "10 steps in place of 40" in start(**{"train.steps": 10})[0]
    assert "trained already" in start(**{"train.steps": 8})[0]
    with pytest.raises(ConfigError, match=r"has trained 8 steps.*end it after 7\. Raise train\.steps"):
        start(**{"train.steps": 7})


def test_settings_are_still_compared(start):
    with pytest.raises(ConfigError, match=r"other settings:\n  optim\.learning_rate: was 0\.0015, now 1\.0"):
        start(**{"optim.learning_rate": 1.0})


def test_a_run_from_before_contents_were_recorded_is_compared_by_spelling(start, tmp_path):
    (tmp_path / "run" / "jaxft_run.json").unlink()
    shutil.copy(tmp_path / "rows.jsonl", tmp_path / "copy.jsonl")
    with pytest.raises(ConfigError, match=r"data\.train: was '.*rows\.jsonl', now '.*copy\.jsonl'"):
        start(**{"data.train": str(tmp_path / "copy.jsonl")})
    assert start() == ()
    assert start(**{"data.train": str(tmp_path / "copy.jsonl")}) == ()


def test_rows_have_the_same_digest_as_columns_and_one_by_one():
    random = np.random.default_rng(0)
    examples = [
        Example(
            tokens=random.integers(0, 99, 3 + row % 7).astype(np.int32),
            mask=np.r_[0, random.integers(0, 2, 2 + row % 7)].astype(np.uint8),
            row=row,
        )
        for row in range(5000)
    ]
    digest = identity.rows_read(examples)
    assert identity.rows_read(table_of(examples)) == digest and digest["tokens"] == sum(map(len, examples))
    examples[4999].mask[2] ^= 1
    assert identity.rows_read(examples)["digest"] != digest["digest"]


def test_code_of_rewards_counts_by_content(tmp_path):
    from jaxft.rollouts.reward_functions.named import named_functions

    (tmp_path / "a.py").write_text("def f(completions): return [1] * len(completions)\n")
    shutil.copy(tmp_path / "a.py", tmp_path / "b.py")
    first = identity.code_digest(named_functions(f"{tmp_path}/a.py:f"))
    assert identity.code_digest(named_functions(f"{tmp_path}/b.py:f")) == first
    assert identity.code_digest(named_functions(f"{tmp_path}/a.py:f=0.5")) != first
    (tmp_path / "a.py").write_text("def f(completions): return [2] * len(completions)\n")
    assert identity.code_digest(named_functions(f"{tmp_path}/a.py:f")) != first


def test_digests_of_weights_do_not_depend_on_where_they_are(model, tmp_path):
    digest = weights_digest(model)
    files = fsspec.filesystem("memory")
    for file in Path(model).iterdir():
        files.pipe(f"/models/base/{file.name}", file.read_bytes())
    assert weights_digest("memory://models/base") == digest
    shutil.copytree(model, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}, indent=7))
    (tmp_path / "copy" / "README.md").write_text("x")
    assert weights_digest(str(tmp_path / "copy")) == digest
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert weights_digest(str(tmp_path / "copy")) != digest
    assert weights_digest(model, weights=False) == weights_digest(write_model(tmp_path / "seed1", 1), weights=False)


@pytest.mark.parametrize("at", [0, 3000, 9999])
def test_blocks_of_large_files_are_read(tmp_path, monkeypatch, at):
    monkeypatch.setattr(weights, "WHOLE", 100)
    monkeypatch.setattr(weights, "BLOCKS", 5)
    monkeypatch.setattr(weights, "BLOCK", 600)
    file = tmp_path / "model.gguf"
    content = bytearray(np.random.default_rng(0).bytes(10_000))
    file.write_bytes(content)
    digest = weights_digest(str(file))
    starts = [0, 2350, 4700, 7050, 9400]
    expected = hashlib.sha256(b"10000 " + b"".join(content[start : start + 600] for start in starts)).hexdigest()
    assert digest == expected
    content[at] ^= 1
    file.write_bytes(content)
    changed = any(start <= at < start + 600 for start in starts)
    assert (weights_digest(str(file)) != digest) == changed


def test_parts_of_a_gguf_file_count_together(tmp_path):
    for number in (1, 2):
        (tmp_path / f"m-{number:05d}-of-00002.gguf").write_bytes(b"%d" % number)
    first = weights_digest(str(tmp_path / "m-00001-of-00002.gguf"))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"3")
    assert weights_digest(str(tmp_path / "m-00001-of-00002.gguf")) != first
