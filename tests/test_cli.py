"""The commands, as a user types them: one small run, then everything that can be done with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

import jaxft
from jaxft import cli
from jaxft.checkpoint.hub.push import Push

CONFIG = "--config=configs/quickstart.py:smoke"


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """jax.distributed starts before any device is used, and pytest has used them; tests/runs/test_kill.py starts it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxft.sharding.distributed.start", lambda *a, **k: True)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished smoke run: (its folder, what --json printed)."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *a, **k: printed.append(a[0]) if k.get("file") is None else None)
        code = cli.main(["train", CONFIG, f"--config.output_dir={folder}", "--json"])
    assert code == 0
    assert len(printed) == 1, "standard output must hold the JSON alone"
    return folder, json.loads(printed[0])


def test_summary_names_what_the_folder_holds(run):
    folder, summary = run
    assert summary == json.loads((folder / "summary.json").read_text())
    assert summary["examples"] == 4 and 0 <= summary["base_score"] <= 1 and 0 <= summary["tuned_score"] <= 1
    for key in ("adapter", "merged", "report", "loss_plot"):
        assert (folder / summary[key]).exists(), key
    resolved = json.loads((folder / "config.json").read_text())
    assert resolved["train"]["steps"] == 4 and resolved["output_dir"] == str(folder)


def test_every_held_out_answer_is_kept(run):
    folder, summary = run
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [(row["way"], row["row"]) for row in rows] == [(way, n) for way in ("base", "tuned") for n in range(4)]
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["base_answers"] == [row["text"] for row in rows[:4]]
    for way in ("base", "tuned"):
        right = sum(row["scores"]["json_exact"] for row in rows if row["way"] == way)
        assert right == scores[way]["correct"] == summary[f"{way}_correct"]


def test_same_command_again_keeps_the_finished_run(run, capsys):
    folder, summary = run
    before = (folder / "metrics.jsonl").read_text()
    config = jaxft.get_config("configs/quickstart.py:smoke", {"output_dir": str(folder)})
    answers = (folder / "answers.jsonl").read_text()
    assert jaxft.train(config)["tuned_score"] == summary["tuned_score"]
    assert (folder / "answers.jsonl").read_text() == answers
    assert (folder / "metrics.jsonl").read_text() == before


def test_other_settings_in_the_same_folder_are_refused(run, capsys):
    folder, _ = run
    code = cli.main(["train", CONFIG, f"--config.output_dir={folder}", "--config.optim.learning_rate=0.5"])
    assert code == 2
    assert "optim.learning_rate: was 0.0015, now 0.5" in capsys.readouterr().err


def test_eval_of_a_run_equals_its_own_figures(run, capsys):
    folder, summary = run
    assert cli.main(["eval", f"--run={folder}", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["eval_loss"] == pytest.approx(summary["eval_loss"], abs=1e-5)
    assert figures["value"] == summary["tuned_score"]


def test_a_run_is_compared_with_prompts(run, tmp_path, capsys):
    folder, summary = run
    command = ["compare", f"--run={folder}", f"--to={tmp_path}", "--shots=1", "--choose=bm25", "--json"]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    by_name = {way["name"]: way for way in result["ways"]}
    assert by_name["run"]["value"] == summary["tuned_score"]
    assert by_name["smoke, zero-shot"]["value"] == summary["base_score"]
    assert result["main"]["tuned"] == "run" and result["verdict"]["kind"] == "open"
    assert cli.main([*command, "--require=tuned>prompt"]) == 3
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ways"] == result["ways"] and "--require=tuned>prompt is not met" in captured.err


def test_exports_of_a_run_and_of_its_adapter_agree(run, tmp_path, capsys, monkeypatch):
    folder, _ = run
    pushed = []
    monkeypatch.setattr(Push, "check", lambda self: pushed.append(self))
    monkeypatch.setattr(Push, "push", lambda self, to, base: pushed.append((to, base)) or "https://hub/owner/mine")
    command = ["export", f"--run={folder}", f"--to={tmp_path / 'a'}", "--format=merged", "--push=owner/mine"]
    assert cli.main([*command, "--hub_base=owner/base", "--public"]) == 0
    out = capsys.readouterr().out
    assert "read back by jaxft" in out and out.endswith("pushed to https://hub/owner/mine\n")
    assert pushed == [Push(name="owner/mine", public=True, base="owner/base"), (tmp_path / "a", "owner/base")]
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert card.data.base_model == "owner/base" and "--model=hf://owner/base" in card.text
    # Nothing that is uploaded names a folder of this machine.
    texts = [path for path in (tmp_path / "a").iterdir() if path.suffix in (".json", ".md", ".jinja")]
    assert len(texts) > 3
    assert not [path for path in texts if str(folder.parent) in path.read_text() or str(tmp_path) in path.read_text()]
    assert cli.main(["export", f"--model={folder / 'adapter'}", f"--to={tmp_path / 'b'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"]["jaxft"] < 1e-5
    tokens = np.arange(40).reshape(2, 20)
    ours = jaxft.load_model(str(folder)).logits(tokens)
    for name in ("a", "b"):
        np.testing.assert_allclose(jaxft.load_model(str(tmp_path / name)).logits(tokens), ours, atol=1e-5)
    assert cli.main(["export", f"--run={folder}", f"--to={tmp_path / 'a'}"]) == 2
    assert "not empty" in capsys.readouterr().err


def test_generate_chat_and_batch(run, capsys):
    folder, _ = run
    command = ["generate", f"--model={folder}", "--prompt=one", "--prompt=two", "--max_new_tokens=5", "--json"]
    assert cli.main([*command, "--chat", "--system=Short."]) == 0
    chat = json.loads(capsys.readouterr().out)["answers"]
    assert cli.main(command) == 0
    plain = json.loads(capsys.readouterr().out)["answers"]
    assert len(chat) == len(plain) == 2
    assert cli.main([*command, "--temperature=1.0", "--seed=3"]) == 0
    drawn = json.loads(capsys.readouterr().out)["answers"]
    assert cli.main([*command, "--temperature=1.0", "--seed=3"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == drawn


def test_generate_streams_a_single_answer_to_a_terminal(run, capsys, monkeypatch):
    folder, _ = run
    command = ["generate", f"--model={folder}", "--prompt=one", "--max_new_tokens=5", "--temperature=1.0"]
    assert cli.main(command) == 0
    at_once = capsys.readouterr().out
    pieces = []
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("builtins.print", lambda text, **options: pieces.append(text + options.get("end", "\n")))
    assert cli.main(command) == 0
    assert len(pieces) > 2 and "".join(pieces) == at_once


def test_generate_takes_every_setting_of_sampling(run, capsys):
    folder, _ = run
    model, tokenizer = jaxft.load_model(str(folder)), jaxft.load_tokenizer(str(folder))
    plain = jaxft.generate(model, tokenizer, ["one"], max_new_tokens=12)
    command = ["generate", f"--model={folder}", "--prompt=one", "--max_new_tokens=12", "--json"]

    def answers(*options):
        assert cli.main([*command, *options]) == 0
        return json.loads(capsys.readouterr().out)["answers"]

    assert answers() == plain
    # Nothing but the likeliest token is as likely as itself.
    assert answers("--temperature=5.0", "--min_p=0.999999") == plain
    assert answers("--repetition_penalty=1000.0") != plain
    cut = plain[0][1]
    assert answers(f"--stop={cut}", "--stop=never said") == [plain[0][: plain[0].index(cut)]]
    assert jaxft.generate(model, tokenizer, ["one"], max_new_tokens=12, stop=cut) == answers(f"--stop={cut}")


def test_data_shows_the_examination(capsys):
    assert cli.main(["data", CONFIG, "--rows=1"]) == 0
    out = capsys.readouterr().out
    assert "24 rows (messages 24)" in out and "[[{" in out
    assert cli.main(["data", CONFIG, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 24


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", CONFIG, "--config.train.batch_sise=4"], "Did you mean 'train.batch_size'"),
        (["train", CONFIG, "--config.train.batch_size=four"], "must be a whole number"),
        (["train", "--config=configs/quickstrat.py"], "Did you mean 'quickstart.py'"),
        (["train", "--config=configs/quickstart.py:smok"], "Did you mean 'smoke'"),
        (
            ["train", CONFIG, "--config.train.batch_size=7", "--config.train.accumulation_steps=2"],
            "equal micro-batches",
        ),
        (["train", CONFIG, "--batch=4"], "unknown argument '--batch=4'"),
        (["train", CONFIG, "--config.data.max_length"], "has no value"),
        (["generate", "--model=x", "--config.seed=1"], "generate reads none"),
        (["eval"], "either --run=FOLDER or --config=FILE"),
        (["export", "--to=x"], "either --run=FOLDER or --model=PATH"),
        (["export", "--model=m", "--to=x", "--public"], "--public says how --push uploads"),
        (["generate", "--model=no/such/model", "--prompt=x"], "no/such/model"),
        (["chat", "--model=no/such/model"], "no/such/model"),
    ],
)
def test_refusals_exit_with_2_and_say_why(arguments, said, capsys, tmp_path):
    extra = [f"--config.output_dir={tmp_path / 'r'}"] if arguments[0] == "train" else []
    assert cli.main([*arguments[:2], *extra, *arguments[2:]] if extra else arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_no_library_speaks_beside_a_command(tmp_path):
    """Nothing is said where torch is absent. Here it may be installed, so another process does not find it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name.partition('.')[0] == 'torch' else find(name, *a)\n"
    )
    command = [sys.executable, "-m", "jaxft.cli", "data", CONFIG, f"--config.output_dir={tmp_path / 'run'}"]
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(jaxft.__file__).parents[1]}"}
    env = {key: value for key, value in env.items() if key not in cli.QUIET}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert "<|im_start|>assistant" in done.stdout


SMOKE = "--model=jaxft/assets/smoke"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", SMOKE, "--chat", '--chat_template_kwargs={"think": 1}'], "no variable 'think'"),
        (["generate", SMOKE, "--chat", "--chat_template_kwargs=think"], "must be a JSON object, such as"),
        (["generate", SMOKE, '--chat_template_kwargs={"think": 1}'], "add --chat"),
        (["generate", SMOKE, "--chat", "--chat_template=lama3"], "Did you mean 'llama3'"),
        (["chat", SMOKE, '--chat_template_kwargs={"messages": 1}'], "'messages' is what every rendering gives itself"),
        (["generate", "--model=HuggingFaceTB/SmolLM2-135M"], "write hf://HuggingFaceTB/SmolLM2-135M."),
        (["data", CONFIG, "--config.model.path=a/b"], "write hf://a/b."),
        (["data", CONFIG, '--config.data.chat_template_kwargs={"think": 1}'], "no variable 'think'"),
    ],
)
def test_templates_and_names_that_do_not_fit_are_refused_before_weights_are_read(
    arguments, message, capsys, monkeypatch
):
    monkeypatch.setattr("jaxft.checkpoint.load.load_weights", lambda *a, **k: pytest.fail("weights were read"))
    prompt = ["--prompt=Hi"] if arguments[0] == "generate" else []
    assert cli.main([*arguments, *prompt]) == 2
    assert message in capsys.readouterr().err


def test_data_says_which_date_the_template_shows(tmp_path, capsys):
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    given = [f"--config.data.chat_template={template}", "--config.data.template_date=2024-02-29"]
    assert cli.main(["data", CONFIG, *given, "--json"]) == 0
    shown = capsys.readouterr().err
    assert "the current date, which stays 2024-02-29 (data.template_date)" in shown and "29 Feb 2024\n" in shown
