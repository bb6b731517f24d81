"""Names use the terms of the field: words of a private dialect are kept out of identifiers."""

import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxft"
# Word -> the terms to use in its place.
DIALECT = {
    "place": "param, module, axis, position or stack_index", "placed": "param or sharded", "places": "the plural noun",
    "stored": "storage_dims, source_name or dtype", "spread": "put_global, a layout or a mass", "parted": "tp_side",
    "lend": "bind_shared", "lent": "shared", "still": "frozen", "moving": "trainable", "agreed": "on_primary",
    "several": "is_multi_process", "apart": "difference or separate", "together": "verb + noun", "beside": "a noun",
    "behind": "prepend", "reckon": "estimate", "reckoned": "estimated", "blueprint": "AbstractStep",
    "looks": "AttentionGroup", "said": "message or text", "asked": "request", "found": "the noun of the thing",
    "figures": "metrics, costs or summary", "made": "verb + noun", "through": "frozen_product",
    "hold": "add or keep", "held": "cache or adapter_set",
}  # fmt: skip
BRITISH = re.compile(r"quantis|normalis|initialis|serialis|tokenis|optimis|penalis|colour|centre|neighbour|favour")
# `held` of "held out" is the field's own; the others are names of the standard library or of others' errors.
KEPT = re.compile(r"held_?out|FileNotFoundError|ModuleNotFoundError|PackageNotFoundError|DatasetNotFoundError", re.I)


def words_of(name: str) -> set[str]:
    parts = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", KEPT.sub("", name)).lower().split("_")
    return {part for part in parts if part}


def identifiers(path: Path) -> dict[str, int]:
    """Every identifier of a module, with the first line that it is on."""
    names: dict[str, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NAME:
            names.setdefault(token.string, token.start[0])
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_identifiers_use_the_terms_of_the_field(path: Path) -> None:
    wrong = []
    for name, line in identifiers(path).items():
        wrong += [f"{path}:{line}: {name}: use {DIALECT[word]}" for word in words_of(name) & DIALECT.keys()]
        wrong += [f"{path}:{line}: {name}: American spelling" for _ in BRITISH.findall(name.lower())]
    assert not wrong, "\n".join(wrong)


def test_the_words_are_recognised_in_every_spelling_of_a_name() -> None:
    assert words_of("PlacedTensors") == {"placed", "tensors"} and "said" in words_of("_said_so")
    assert not words_of("held_out_metrics") & DIALECT.keys() and "held" in words_of("held_cache")
