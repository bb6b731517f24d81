"""Writes docs/configuration.md from the fields that jaxft/config/ declares: `python docs/make_configuration.py`."""

import dataclasses
import inspect
from pathlib import Path

from jaxft.config import RunConfig
from jaxft.config.fields import Field, ReadBy, Section, own_fields

TARGET = Path(__file__).with_name("configuration.md")
RESUME, CONTENT = "↻", "≡"
HEAD = f"""\
# Configuration

<!-- Written by docs/make_configuration.py from jaxft/config/; do not edit. -->

A run needs no config file. `jaxft train --model=PATH --data=ROWS` takes the defaults below; the settings that most runs
change have flags of their own (`jaxft train --help`), and every field can be set by its name in the tables:

    jaxft train --model=hf://owner/name --data=rows.jsonl --batch_size=8 --optim.schedule=linear

`--config` names what the settings are laid over:

- a config that ships with jaxft: `--config=llama3_1_8b_lora`. A wrong name lists them all. `configs/NAME.py` means the
  same, in a checkout and outside of one.
- a Python file with a function `get_config(arg)`, which fills `jaxft.config.default_config()` and returns it.
- a YAML file (`.yaml` or `.yml`) of the sections below. The fields say what a text means, so `1e-4` is a number and
  `no` is False, and `null` empties a field.
- the folder of a run, whose `config.json` is read, or any such JSON file.

A flag goes over the file, the file over the defaults. `None` or `null` empties a field whose type permits it. In fields
that list names, separated by commas, a list does as well: `[q_proj, v_proj]`. Configs and options of other programs
(axolotl, LLaMA-Factory, torchtune, TRL, ...) are answered with the fields that theirs correspond to.

Every config also takes the argument `:smoke` (`--config=quickstart:smoke`), which keeps the method and shrinks the rest
to seconds: a random two-layer model, 24 rows of the form that the method trains on, 4 steps, `output_dir` with `-smoke`
at its end.

An unknown name, a wrong type and a combination that cannot be carried out are refused before anything is loaded, with
the nearest name that exists. So is a field that nothing reads, if it is set to another value than its default. The
resolved config is written to `config.json` in the run folder. When a run is resumed, only the fields with {RESUME} may
differ from it, and those with {CONTENT} may be spelt otherwise as long as what they name holds the same; see
[resume](checkpoints.md#resume).
"""


def takes(field: Field) -> str:
    """The values that a field takes: its choices, or its type and range."""
    if field.sections:
        return "sections"
    values = field.spelling.words if field.spelling else field.choices
    kind = ", ".join(f"`{value}`" for value in values) or field.base.__name__
    kind += " or None" if field.optional else ""
    return ", ".join([kind, *(range_.words for range_ in field.ranges)])


def condition(dependency: ReadBy) -> str:
    """The condition under which a field is read."""
    *most, last = [f"`{value}`" for value in dependency.values] or ["set"]
    return f"read if `{dependency.key}` is " + (f"{', '.join(most)} or {last}" if most else last)


def row(field: Field) -> str:
    """A line of a section's table. Raises SystemExit if the field has no meaning."""
    if not field.meaning:
        raise SystemExit(f"{field.key} has no meaning: write one into its annotation in jaxft/config/")
    conditions = "; ".join(condition(dependency) for dependency in field.dependencies)
    meaning = f"{field.meaning} *({conditions})*" if conditions else field.meaning
    mark = f" {RESUME}" if field.free_to_change else f" {CONTENT}" if field.by_content else ""
    return f"| `{field.key}`{mark} | {takes(field)} | `{field.default!r}` | {meaning} |"


def chapters_of(cls: type[Section], name: str, prefix: str = "", free: bool = False, about: str = "") -> list[str]:
    """The chapters of a section and of those within it.

    free: whether all of its fields may change on resume. about: a sentence that follows the section's own.
    """
    fields = [dataclasses.replace(f, free_to_change=f.free_to_change or free) for f in own_fields(cls, prefix)]
    rows = [row(field) for field in fields if not issubclass(field.base, Section)]
    table = ["| field | takes | default | meaning |", "|---|---|---|---|", *rows]
    chapters = [f"\n## {name}\n\n{inspect.getdoc(cls)}{about}\n\n" + "\n".join(table) + "\n"]
    chooser = next((field.key for field in fields if field.chooses_section), None)
    for field in fields:
        key, free = field.key, field.free_to_change
        if issubclass(field.base, Section):
            about = f" Read if `{chooser}` is `{key.removeprefix(prefix)}`." if chooser else ""
            chapters += chapters_of(field.base, key, f"{key}.", free, about)
        elif field.sections:
            chapters += chapters_of(field.sections, f"{key}.NAME", f"{key}.NAME.", free)
    return chapters


def page() -> str:
    """The text of configuration.md."""
    return HEAD + "".join(chapters_of(RunConfig, "The run"))


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
    print(f"wrote {TARGET}")
