"""The documents are true: generated pages are fresh, and links, paths, names, fields and options in them exist."""

import argparse
import ast
import dataclasses
import fnmatch
import functools
import importlib.util
import inspect
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from docs_names import FOLDERS, is_config_field, names, path_exists, unknown_names
from test_architecture import FLOORS

import jaxft
from jaxft import cli
from jaxft.cli.settings import FLAGS
from jaxft.config import RunConfig
from jaxft.config.fields import all_fields
from jaxft.errors import ExitCode

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/*.md", "tpu_scripts/*.md", "jaxft/assets/*/*.md", "notebooks/*.ipynb")
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
README = ROOT / "README.md"
PACKAGE = ROOT / "jaxft"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
# Shown as mistakes, or as the form of an override.
NOT_FIELDS = {"section.field", "train.batchsize"}
MAXTEXT_PAGE = "docs/reference/models/tiering.md"  # in MaxText's repository
OTHER_PROGRAMS = {"--lora": "llama.cpp", "--ntasks-per-node": "srun", "--worker": "gcloud"}
# On lines that begin with these programs, options are theirs.
FOREIGN = re.compile(r"\s*(?:docker|gcloud|kubectl|llama-server|ollama|sky|vllm|xpk) ")


def text_of(page: Path) -> str:
    """The text of a page; of a notebook, that of its text cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    return "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")


def blocks_and_prose(text: str) -> tuple[list[str], str]:
    """The code blocks of a page, fenced or indented, and the text between them."""
    block = re.compile(r"^```[\s\S]*?^```$|(?:^ {4}.*\n(?:\n(?= {4}))*)+", re.MULTILINE)
    return block.findall(text), block.sub("", text)


def code_in(text: str) -> list[str]:
    """Every piece of `code` in the prose of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", blocks_and_prose(text)[1])]


def commands_in(text: str) -> list[str]:
    """Lines of code of a page, each with its continuations; without those of programs whose options are not known."""
    blocks = "\n".join(blocks_and_prose(text)[0])
    lines = [*re.sub(r"\\\n|\n +(?=\[--)", " ", blocks).splitlines(), *code_in(text)]
    return [line for line in lines if not FOREIGN.match(line)]


@functools.cache
def defaults_of_verbs() -> dict[str, dict[str, object]]:
    """The options of every command of the command line, with their defaults."""
    verbs = sub_parsers(cli.make_parser())
    verbs |= {f"pod {verb}": parser for verb, parser in sub_parsers(verbs.pop("pod")).items()}
    return {
        verb: {option: action.default for option, action in parser._option_string_actions.items()}
        for verb, parser in verbs.items()
    }


def sub_parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return dict(next(action.choices for action in parser._actions if isinstance(action.choices, dict)))


@functools.cache
def options_of_verbs() -> dict[str, set[str]]:
    """The options of every command of the command line."""
    return {verb: set(defaults) for verb, defaults in defaults_of_verbs().items()}


def options_of(command: str) -> set[str]:
    """The options that a line of code may use: those of its program, or of all if it names none."""
    scripts = [ROOT / path for path in re.findall(r"(?:benchmarks|docs|tpu_scripts)/\w+\.(?:py|sh)", command)]
    verbs = [verb for verb in re.findall(r"\bjaxft (pod \w+|[\w-]+)", command) if verb in options_of_verbs()]
    if verbs and not scripts:
        return options_of_verbs()[verbs[0]] | {"--config"}
    used = [*scripts, ROOT / "tpu_scripts" / "common.sh"]
    if not scripts:
        used += [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tpu_scripts/*.sh")]
    in_scripts = {option for path in used for option in re.findall(r"--[a-z][\w-]*", path.read_text())}
    return in_scripts if scripts else in_scripts.union(OTHER_PROGRAMS, *options_of_verbs().values())


@pytest.fixture(scope="module")
def make_configuration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_page_is_fresh(make_configuration: ModuleType) -> None:
    written = make_configuration.TARGET.read_text(encoding="utf-8")
    assert written == make_configuration.page(), "run python docs/make_configuration.py"


def test_a_field_without_a_meaning_is_refused(make_configuration: ModuleType) -> None:
    field = dataclasses.replace(all_fields(RunConfig)["optim.adamw.b1"], meaning="")
    with pytest.raises(SystemExit, match=r"optim\.adamw\.b1 has no meaning"):
        make_configuration.row(field)


def test_configuration_page_shows_every_field_with_its_choices_and_ranges(make_configuration: ModuleType) -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)`( .*)$", make_configuration.page(), re.MULTILINE))
    fields = all_fields(RunConfig)
    assert list(rows) == [key for key in rows if key in fields] and rows.keys() == fields.keys()
    for key, field in fields.items():
        expected = [*field.choices, *(range_.words for range_ in field.ranges), repr(field.default)]
        expected += [*(field.spelling.words if field.spelling else ()), *(["↻"] if field.free_to_change else [])]
        assert all(text in rows[key] for text in [*expected, field.meaning]), key
        assert ("↻" in rows[key]) == field.free_to_change and ("≡" in rows[key]) == field.by_content, key


@every_page
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


@every_page
def test_every_path_on_a_page_exists(page: Path) -> None:
    paths = re.findall(rf"(?<![\w./~-])(?:{'|'.join(FOLDERS)})/[\w./*<>-]*", text_of(page))
    assert not [path for path in paths if not path_exists(path)]


SOURCES = [path for folder in ("benchmarks", "configs", "docs", "jaxft") for path in ROOT.glob(f"{folder}/**/*.py")]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_that_a_source_names_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace(MAXTEXT_PAGE, "")
    paths = re.findall(rf"(?<![\w./~-])(?:{'|'.join(FOLDERS)})/[\w/]+\.(?:py|md|sh|json|ipynb)\b", text)
    assert not [named for named in paths if not path_exists(named)]


@every_page
def test_every_name_on_a_page_exists(page: Path) -> None:
    assert not {code: unknown for code in code_in(text_of(page)) if (unknown := unknown_names(code))}


@pytest.mark.parametrize(
    "code",
    [
        "jaxft/nn/linears.py", "nn/linears", "qwen5.py", "summery.json", "optim/make.make_optimiser", "Decoder.rooted",
        "jaxft.nn.virtual.ids", "jaxft.finetune(config)", "LossSum", "make_optimiser", "fourbit-dq", "stored_at()",
        "train.batchsize", "data.mixture.NAME.weights", "evals.*", "tests/test_nothing.py",
    ],
)  # fmt: skip
def test_a_name_that_nothing_defines_is_seen(code: str) -> None:
    assert unknown_names(code)


@every_page
def test_every_message_on_a_page_is_one_of_ours(page: Path) -> None:
    for line in commands_in(text_of(page)):
        message = re.match(r" *(?:jaxft \w+|gemma3): (.+)", line)
        parts = re.split(r"\d[\d,]*|'[^']*'|\.\.\.|\w+Error|: |\w+ \(", message.group(1)) if message else []
        for part in (part.strip(" :.") for part in parts if len(part.split()) > 2):
            assert part in names().messages, f"{line.strip()}: no source says {part!r}"


@every_page
def test_every_field_that_a_page_sets_exists(page: Path) -> None:
    forms = (
        r"--config\.([\w.]+)=",
        r"(?<![\w-])--(?!config\.)([a-z]+\.[\w.]+)=",
        r"^ *config\.([\w.]+) =",
        r"\"([a-z]+\.[\w.]+)\": ",
    )
    keys = [key for form in forms for key in re.findall(form, text_of(page), re.MULTILINE)]
    assert not [key for key in keys if not is_config_field(key) and key not in NOT_FIELDS]


@every_page
def test_every_option_on_a_page_exists(page: Path) -> None:
    for command in commands_in(text_of(page)):
        before, _, after = command.partition("  # ")[0].partition(" -- ")
        known = options_of(before) | (options_of("jaxft train") if after else set())
        options = set(re.findall(r"(?<![\w=-])--[a-zA-Z][\w-]*+(?!\.\w)", f"{before} {after}"))
        assert options <= known, f"{command}: {options - known}"


@every_page
def test_every_make_target_and_extra_on_a_page_exists(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    extras = re.findall(r'^ +"(\w+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    for command in commands_in(text_of(page)):
        made = re.match(r"\s*make (?:\w+=\S+ )?([\w-]+)", command)
        assert made is None or made.group(1) in targets, command
        assert set(re.findall(r"(?:jaxft|\.)\[(\w+)\]", command)) <= set(extras), command


@pytest.mark.parametrize(
    "command", ["jaxft data --topology=v5e:1x1", "python benchmarks/lora_vs_peft.py --topology=v5e:1x1", "--topologie"]
)
def test_an_option_of_another_program_is_seen(command: str) -> None:
    assert not set(re.findall(r"--\w+", command)) <= options_of(command)


def test_the_readme_shows_every_command_and_every_option() -> None:
    usage = README.read_text(encoding="utf-8").split("## Commands")[1].split("All commands take `--json`")[0]
    usage, _, sampling = re.sub(r"\n +(?=\[)", " ", usage).partition("SAMPLING: ")
    usage, _, settings = usage.partition("SETTINGS: ")
    usage = usage.replace("[SAMPLING]", sampling).replace("[SETTINGS]", settings.strip())
    lines = dict(re.findall(r"^    jaxft (pod \w+|[\w-]+)(.*)$", usage, re.MULTILINE))
    named = {verb: re.sub(r"--(?:config|section)\.", "", line) for verb, line in lines.items()}
    shown = {verb: set(re.findall(r"--[a-z_]+", line)) for verb, line in named.items()}
    assert shown == {
        verb: options - {"-h", "--help", "--json", "--debug"} for verb, options in options_of_verbs().items()
    }
    for verb, line in lines.items():
        for option, default in re.findall(r"\[(--[a-z_]+)=(\d\w*)\]", line):
            own = defaults_of_verbs()[verb][option]
            if own is None:  # a setting of a run, whose default is the config's
                field = next(flag.fields[0] for flag in FLAGS if f"--{flag.name}" == option)
                own = all_fields(RunConfig)[field].default
            assert str(own).removesuffix(".0") == default, f"{verb} {option}"


def test_a_look_at_the_data_reads_as_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.search(r"    \$ jaxft (data .+)\n((?:    .+\n)+)", README.read_text(encoding="utf-8"))
    assert cli.main(shown.group(1).replace("configs", str(ROOT / "configs")).split()) == 0
    printed = "\n".join(" ".join(line.split()) for line in capsys.readouterr().out.splitlines())
    lines = [" ".join(line.split()) for line in shown.group(2).splitlines()]
    lines[0] = lines[0].replace("...", str(PACKAGE / "assets"))
    for part in "\n".join(lines).split("\n...\n"):
        assert part in printed


def test_a_mistake_is_answered_as_the_readme_shows(capsys: pytest.CaptureFixture[str]) -> None:
    command, answer = re.search(r"    \$ jaxft (train .+)\n    (.+)\n", README.read_text(encoding="utf-8")).groups()
    assert cli.main(command.replace("configs", str(ROOT / "configs")).split()) == 2
    assert capsys.readouterr().err == f"{answer}\n"


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text_of(page), re.DOTALL)


@every_page
def test_python_on_a_page_calls_the_api_with_its_arguments(page: Path) -> None:
    for node in (node for block in python_blocks(page) for node in ast.walk(ast.parse(block))):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "jaxft"
        ):
            arguments = set(inspect.signature(getattr(jaxft, node.func.attr)).parameters)
            assert {keyword.arg for keyword in node.keywords} <= arguments, ast.unparse(node)


def test_python_in_the_readme_shows_the_whole_api() -> None:
    assert set(re.findall(r"jaxft\.(\w+)\(", "".join(python_blocks(README)))) == set(jaxft.__all__)


def test_fields_that_may_change_on_resume_are_listed() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    listed = re.search(r"These fields may change.*?\n\n", page, re.DOTALL).group()
    names = re.findall(r"`([\w.*]+)`", listed)
    covered = {name: {key for key in all_fields(RunConfig) if fnmatch.fnmatch(key, name)} for name in names}
    free = {key for key, field in all_fields(RunConfig).items() if field.free_to_change}
    assert all(covered.values()) and set().union(*covered.values()) == free
    by_content = re.search(r"These fields are compared by content.*?\n\n", page, re.DOTALL).group()
    assert set(re.findall(r"`([\w.*]+)`", by_content)) == {
        key for key, field in all_fields(RunConfig).items() if field.by_content
    }


def test_the_table_of_exit_codes_is_whole() -> None:
    table = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8").split("## Exit codes")[1].split("\n## ")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == set(ExitCode)


def test_planned_lines_on_the_pages_are_those_of_the_configs() -> None:
    configs = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("configs/*.py"))
    shown = [line for page in PAGES for line in re.findall(r"^ +(Planned for v.+)$", text_of(page), re.MULTILINE)]
    assert shown and not [line for line in shown if line not in configs]


def test_speeds_in_the_readme_are_those_of_the_page_on_performance() -> None:
    speed = README.read_text(encoding="utf-8").split("## Speed")[1].split("\n## ")[0]
    rows = [line for line in speed.splitlines() if line.startswith("| ")]
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 3 and not [row for row in rows if row not in page]


def test_the_house_is_drawn_as_it_is_tested() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    drawn = {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}
    assert drawn == {room: floor for room, floor in FLOORS.items() if room != "__init__"}


def test_the_nouns_stand_where_the_house_says() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `([\w/]+)` \|", text, re.MULTILINE)
    assert len(found) > 8
    for nouns, place in found:
        path = PACKAGE / place
        files = [path.with_suffix(".py")] if not path.is_dir() else path.rglob("*.py")
        code = "".join(file.read_text(encoding="utf-8") for file in files)
        for noun in re.findall(r"`(\w+)`", nouns):
            defined = rf"^\s*(?:class {noun}\b|def {noun}\b|{noun} = )"
            assert re.search(defined, code, re.MULTILINE), f"{noun} is not in {place}"
