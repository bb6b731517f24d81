"""The documents say what is: generated pages are fresh, links lead somewhere, the house stands as drawn."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from test_architecture import FLOORS

import jaxft
from jaxft import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tpu_scripts/*.md")])
README = ROOT / "README.md"
PACKAGE = ROOT / "jaxft"


@pytest.fixture(scope="module")
def make_configuration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs" / "make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_configuration_page_is_fresh(make_configuration: ModuleType) -> None:
    written = make_configuration.TARGET.read_text(encoding="utf-8")
    assert written == make_configuration.page(), "run python docs/make_configuration.py"


def test_a_meaning_without_a_field_is_refused(make_configuration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(make_configuration.MEANINGS, "train.no_such_field", "nothing")
    with pytest.raises(SystemExit, match=r"train\.no_such_field"):
        make_configuration.page()


def test_a_field_without_a_meaning_is_refused(make_configuration: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(make_configuration.MEANINGS, "optim.b1")
    with pytest.raises(SystemExit, match=r"optim\.b1 has no meaning"):
        make_configuration.page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_every_config_that_a_document_names_exists() -> None:
    for page in PAGES:
        for name in re.findall(r"configs/(\w+)\.py", page.read_text(encoding="utf-8")):
            assert name == "NAME" or (ROOT / "configs" / f"{name}.py").is_file(), f"{page.name}: configs/{name}.py"


def test_every_field_in_a_command_exists(make_configuration: ModuleType) -> None:
    from jaxft.config import RunConfig

    known = {f"{s}.{f}" if isinstance(v, dict) else s for s, v in RunConfig().to_dict().items() for f in _names(v)}
    for page in PAGES:
        for key in re.findall(r"--config\.([a-z_]+(?:\.[a-z_0-9]+)?)=", page.read_text(encoding="utf-8")):
            wrong_on_purpose = key in ("a.b", "train.batchsize")
            assert wrong_on_purpose or key in known, f"{page.name}: {key}"


def test_commands_in_the_readme_have_these_options() -> None:
    cli._parser()
    commands = README.read_text(encoding="utf-8").split("## Commands")[1].split("`jaxft data` shows")[0]
    named = set(re.findall(r"--[a-z_]+", commands)) - {"--config", "--json"}
    assert named and named <= set(cli._OPTIONS)


def test_python_in_the_readme_compiles_and_names_the_api() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        compile(block, "README.md", "exec")
    assert set(re.findall(r"jaxft\.(\w+)\(", "".join(blocks))) == set(jaxft.__all__)


def _names(value: object) -> list[str]:
    return list(value) if isinstance(value, dict) else [""]


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
