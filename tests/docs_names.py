"""The names that the repository defines, read by ast, and the check of a document's `code` against them."""

import ast
import builtins
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import jaxft
from jaxft.config import RunConfig
from jaxft.config.fields import all_fields

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxft"
FOLDERS = ("benchmarks", "configs", "constraints", "docs", "jaxft", "notebooks", "tests", "tpu_scripts")
FILE = re.compile(r"\.(?:py|md|sh|json|jsonl|html|png|safetensors|jinja|ipynb|toml|j2)$")
# Names of other projects: attributes of these modules, and tensors and modules of Hugging Face's files and of PEFT's.
LIBRARIES = {"jax", "nnx", "optax", "pytest"}
TENSORS = re.compile(
    r"(?:base_model|language_model|model\.language_model|model\.layers|layers|mlp|self_attn|vision_tower"
    r"|multi_modal_projector)[./].*"
)
# Files and folders that are not this repository's: a run's, a user's, other programs'.
ELSEWHERE = re.compile(
    r"(?:runs/.*|checkpoints/.*|adapter/|base/|merged/|meta/|model/|params/.*|state/|tensorboard/|owner/name"
    r"|[\w.<>]+(?:\.jaxft)?\.(?:partial|tmp)"
    r"|(?:rows/|test/)*(?:rows|\*)\.\w+(?:\.gz)?|rows/\*\*/.*|general\.architecture|tokenizer\.model)"
)
# Words of other programs, of formats and of prose that no source of ours holds as a name or in a string.
WORDS = set(
    "AutoModelForImageTextToText CUDA_VISIBLE_DEVICES JAX_LOCAL_DEVICE_IDS Modelfile PYTHON PATH REPOSITORY "
    "PeftTrainer cp gcloud local-completions tmux add_weighted_adapter convert_moe_packed_tensors "
    "path_initial_model_for_weight_conversion replace_lora_weights_loftq train_compile".split()
)


@dataclasses.dataclass(frozen=True)
class Names:
    """modules: top-level names by path without suffix, `jaxft/nn/linear`. classes: attributes of every class by name,
    those of its bases among them. functions: of every level. words: identifiers, and words in strings that are no
    docstrings. formatted: words that an f-string makes, `adapter_checks` of `f"{name}_checks"`.
    messages: the strings of the package."""

    modules: dict[str, set[str]]
    classes: dict[str, set[str]]
    functions: set[str]
    words: set[str]
    formatted: re.Pattern[str]
    messages: str


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.If | ast.Try):
            yield from _defined(node.body)


def _attributes(node: ast.ClassDef) -> Iterator[str]:
    yield from _defined(node.body)
    for inner in ast.walk(node):
        own = isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)
        if own and isinstance(inner.value, ast.Name) and inner.value.id == "self":
            yield inner.attr


def _docstrings(tree: ast.Module) -> set[int]:
    holders = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    first = [node.body[0] for node in holders if node.body]
    return {id(node.value) for node in first if isinstance(node, ast.Expr)}


def _words(tree: ast.Module) -> Iterator[str]:
    docstrings = _docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def _formatted(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            text = "".join(part or "" for part in parts)
            if re.fullmatch(r"[\w/]{5,}", text):
                yield "".join(r"\w+" if part is None else part for part in parts)


@functools.cache
def names() -> Names:
    """Those of every Python file of the repository but these tests of documents."""
    modules, classes, bases, functions, texts, formatted, messages = {}, {}, {}, set(), [], [], []
    for path in (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))):
        if path.name in ("test_docs.py", Path(__file__).name):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        key = path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")
        modules[key] = set(_defined(tree.body))
        texts += _words(tree)
        messages += _words(tree) if path.is_relative_to(PACKAGE) else ()
        formatted += _formatted(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, set()).update(_attributes(node))
                bases.setdefault(node.name, set()).update(b.id for b in node.bases if isinstance(b, ast.Name))
            if isinstance(node, ast.FunctionDef):
                functions.add(node.name)
    for _ in range(4):
        for name, above in bases.items():
            classes[name] |= {attribute for base in above for attribute in classes.get(base, ())}
    modules["jaxft"] |= set(jaxft.__all__)  # the package imports them on use
    texts += [Path(key).name for key in modules]
    words = {word for text in texts for word in (text, *re.findall(r"[\w./-]+", text), *re.findall(r"\w+", text))}
    return Names(
        modules=modules,
        classes=classes,
        functions=functions,
        words=words,
        formatted=re.compile("|".join(formatted)),
        messages="\n".join(messages),
    )


@functools.cache
def names_of_module(module: str) -> set[str] | None:
    """The top-level names of one module, `jaxft.data`, without reading any other file; None if there is no such one."""
    if module == "jaxft":
        return set(jaxft.__all__)
    path = ROOT / module.replace(".", "/")
    file = next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.is_file()), None)
    return set(_defined(ast.parse(file.read_text(encoding="utf-8")).body)) if file else None


def config_fields() -> Iterator[str]:
    """The dotted key of every field and section of a run; `NAME` where users choose a name."""
    for key in all_fields(RunConfig):
        parts = key.split(".")
        yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def is_config_field(key: str) -> bool:
    """Whether there is such a field or section: `train.batch_size`, `data.mixture.mine.weight`, `eval.*`."""
    parts = key.removesuffix(".*").split(".")
    for field in config_fields():
        known = field.split(".")
        if len(known) == len(parts) and all(k in ("NAME", p) for k, p in zip(known, parts, strict=True)):
            return True
    return False


def path_exists(path: str) -> bool:
    """Whether a file or folder is in the repository; parts in capitals, in <> and with * stand for any."""
    pattern = re.sub(r"<\w+>|\b[A-Z]{2,}\b(?!\.md)", "*", path.rstrip("/."))
    return next(ROOT.glob(pattern), None) is not None


def _in_module(module: str, rest: list[str]) -> bool:
    """Whether `rest` is a name in a module whose path ends so, or an attribute of a class there."""
    ends = [key for key in names().modules if f"/{key}".endswith(f"/{module}")]
    if not rest:
        return bool(ends)
    if any(f"{key}/{rest[0]}" in names().modules for key in ends):
        return _in_module(f"{module}/{rest[0]}", rest[1:])
    known = any(rest[0] in names().modules[key] for key in ends)
    return known and all(_is_attribute(a, b) for a, b in itertools.pairwise(rest))


def _is_attribute(cls: str, name: str) -> bool:
    return name in names().classes.get(cls, ())


def _is_elsewhere(name: str) -> bool:
    return bool(ELSEWHERE.fullmatch(name) or TENSORS.fullmatch(name))


def _is_path(name: str) -> bool:
    if path_exists(name) or path_exists(f"jaxft/{name}") or path_exists(f"jaxft/{name}.py"):
        return True
    folder, _, last = name.rstrip("/").rpartition("/")
    return bool(folder) and not FILE.search(last) and _in_module(f"{folder}/{last.split('.')[0]}", last.split(".")[1:])


def _is_ours(first: str, name: str) -> bool:
    """Whether this repository defines what begins so, instead of a file that it writes or another program.

    A section of the config has fields after a dot; after a slash, its name may begin that of a metric.
    """
    rooms = {path.stem for path in PACKAGE.iterdir()}
    return first in rooms | set(FOLDERS) | set(names().classes) or ("/" not in name and is_config_field(first))


def _is_name(name: str) -> bool:
    """Of a name with dots or slashes in it."""
    first, *rest = re.split(r"[./]", name.rstrip("/"))
    if _is_elsewhere(name):
        return True
    if "/" in name:
        known = _is_path(name) or any(name == f"{path.name}/" for path in PACKAGE.rglob("*/"))
    elif FILE.search(name):
        return name in names().words or next(ROOT.glob(f"[!.]*/**/{name}"), None) is not None or path_exists(name)
    elif first == "jaxft":
        known = _in_module("jaxft", rest)
    elif first in names().classes:
        known = _is_attribute(first, rest[0])
    else:
        known = is_config_field(name) or first in LIBRARIES or _in_module(first, rest)
    return known or (not _is_ours(first, name) and _is_written(name))


def _is_written(name: str) -> bool:
    return name in names().words or names().formatted.fullmatch(name) is not None


def _is_word(word: str) -> bool:
    return _is_written(word) or word in WORDS or hasattr(builtins, word)


def unknown_names(code: str) -> list[str]:
    """The names in a piece of `code` that nothing defines: files, modules, fields of a config, functions, words."""
    callable_names = names().functions | set(names().classes) | set(dir(builtins))
    wrong = [f"{call}()" for call in re.findall(r"(?<![\w.])(\w+)\(", code) if call not in callable_names]
    inside = re.findall(r"(?<!\.)jaxft(?:\.\w+)+", code)
    outside = code
    while (shorter := re.sub(r"\([^()]*\)", "", outside)) != outside:
        outside = shorter
    keys = re.findall(r"(?<![\w.-])(\w+)=", outside)
    outside = re.sub(r"=\S*|\w+://\S*|\"[^\"]*\"|--?[a-z]\S*", " ", outside)
    dotted = re.findall(r"(?<![\w.~/-])[A-Za-z_*][\w-]*(?:[./][\w*<>-]+)+/?|(?<![\w.~/-])\w+/(?!\S)", outside)
    wrong += [name for name in dict.fromkeys((*inside, *dotted)) if not _is_name(name)]
    if re.fullmatch(r"\.?[A-Za-z_][\w-]*", code):
        keys.append(code.lstrip("."))
    return wrong + [key for key in keys if not _is_word(key)]
