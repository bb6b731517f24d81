"""What a PEFT folder changes in its base besides attaching halves: whole tensors, rows of tables, untied tables.

In PEFT a tied table is two modules that share a parameter, and each can get a copy or an adapter of its own. Here the
base then has two tables.
"""

# V vocab, D model, n tokens

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.checkpoint.hf import EMBEDDING, TIED_HEAD
from jaxft.checkpoint.peft.folder import AdapterTensors, saved_names, token_indices
from jaxft.checkpoint.peft.keys import PREFIX
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError, listed
from jaxft.models import config_from_hf

TABLES = (EMBEDDING, TIED_HEAD)
ROWS_AT_A_TIME = 8192  # of two tables that are compared
MEND_GROWN = (
    "Resize the base with transformers as it was resized for training (model.resize_token_embeddings), save it, and "
    "give that folder with --base=FOLDER."
)


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows of a table that were trained alone. indices: the tokens, [n]. key: of their values [n, D] in the folder."""

    indices: tuple[int, ...]
    key: str


@dataclass(frozen=True, kw_only=True)
class BaseChange:
    """A base with a folder's whole tensors in their places.

    source: its tensors under Hugging Face names, without the folder's halves and rows. vocab_size: rows of its tables.
    tied: whether the LM head is the embedding table. trained: names of tensors that were trained in full; carried: of
    others that the folder replaces. rows: by the name of the table. notes: sentences on what differs from the base on
    disk.
    """

    source: TensorSource
    vocab_size: int
    tied: bool
    trained: frozenset[str]
    carried: frozenset[str]
    rows: Mapping[str, TokenRows]
    notes: tuple[str, ...]

    def hf_config(self, of_base: Mapping[str, Any]) -> dict[str, Any]:
        """config.json of the changed base. of_base: that of the base on disk."""
        same = config_from_hf(of_base)
        changed: dict[str, Any] = {} if same.vocab_size == self.vocab_size else {"vocab_size": self.vocab_size}
        if same.tie_word_embeddings and not self.tied and same.head == "vocabulary":
            changed["tie_word_embeddings"] = False
        return dict(of_base) | changed


class ChangedTensors:
    """A base some of whose tensors come from elsewhere.

    origins: for a name, (source, name there). Other names are the base's own.
    """

    def __init__(self, base: TensorSource, origins: Mapping[str, tuple[TensorSource, str]]) -> None:
        self.base, self.origins = base, dict(origins)

    def specs(self) -> dict[str, TensorSpec]:
        changed = {name: source.specs()[there] for name, (source, there) in self.origins.items()}
        return self.base.specs() | changed

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        source, there = self.origins.get(name, (self.base, name))
        return source.read(there, index)


def changed_base(
    tensors: AdapterTensors,
    config: Mapping[str, Any],
    base: TensorSource,
    *,
    tied: bool,
    folder: str,
    compare: bool = True,
) -> BaseChange:
    """The base of a PEFT folder with the folder's whole tensors in their places.

    config: its adapter_config.json. base: the tensors of the base on disk. tied: whether its LM head is its embedding
    table. compare: whether tensors that equal the base's are left out; False where the base has shapes alone. Raises
    CheckpointError listing tensors that are none of the base's or have another shape, and for tables of different
    lengths; ModelError for tokens that are not described.
    """
    names = saved_names(config)
    biases = config.get("bias") in ("all", "lora_only")
    trained, plain = _whole(tensors, names, folder, biases=biases)
    rows = _rows(tensors, config, folder, tied=tied)
    _check_named(names, trained, folder)
    ensure = bool(config.get("ensure_weight_tying"))
    untied = tied and _has_two_tables(tensors, trained, rows, ensure=ensure)
    one_table = tied and not untied
    if one_table:
        _check_equal(tensors, trained, plain, rows, folder)
        trained, plain, rows = (_as_embedding(each) for each in (trained, plain, rows))
    if compare:
        plain = {name: key for name, key in plain.items() if not _is_copy(tensors, key, base, name, tied=tied)}
    origins: dict[str, tuple[TensorSource, str]] = {
        name: (tensors.files, key) for name, key in (plain | trained).items()
    }
    if untied:
        # What both tables are before one of them is trained: the base's, or the one that the folder has in its place.
        shared = next((plain[name] for name in TABLES if name in plain), None)
        for name in TABLES:
            if name not in origins and (shared is not None or name == TIED_HEAD):
                origins[name] = (base, EMBEDDING) if shared is None else (tensors.files, shared)
    source = ChangedTensors(base, origins) if origins else base
    carried = frozenset(origins) - trained.keys() - ({TIED_HEAD, EMBEDDING} - plain.keys() if untied else set())
    _check_shapes(source, base, origins, untied=untied, folder=folder)
    vocab = source.specs()[EMBEDDING].shape[0]
    _check_rows(tensors, rows, source, folder)
    return BaseChange(
        source=source,
        vocab_size=vocab,
        tied=one_table,
        trained=frozenset(trained),
        carried=carried,
        rows=rows,
        notes=tuple(_notes(base, vocab, untied=untied, carried=carried, folder=folder)),
    )


def _whole(
    tensors: AdapterTensors, names: Collection[str], folder: str, *, biases: bool
) -> tuple[dict[str, str], dict[str, str]]:
    """(keys of tensors that were trained in full, keys of others that stand for the base's), by the base's names."""
    trained: dict[str, str] = {}
    plain: dict[str, str] = {}
    for key, what in tensors.of_role("trained", "base", "plain").items():
        is_bias = biases and what.name.endswith(".bias")
        is_trained = what.role == "trained" or is_bias or (what.role == "plain" and _names(what.name, names))
        kept = trained if is_trained else plain
        other = kept.setdefault(what.name, key)
        # A trainer that saved a grown table wrote the trained one under two names.
        if other != key and not np.array_equal(tensors.files.read(other), tensors.files.read(key)):
            raise CheckpointError(f"{folder}: {other} and {key} are the same tensor, but their values differ")
    return trained, {name: key for name, key in plain.items() if name not in trained}


def _names(tensor: str, modules: Collection[str]) -> bool:
    """Whether one of these modules, by the ends of their names, holds a tensor."""
    parts = tensor.split(".")
    # By their letters, as PEFT compares them: `norm` names `input_layernorm` too.
    return any(".".join(parts[:stop]).endswith(name) for stop in range(1, len(parts)) for name in modules)


def _check_named(names: Collection[str], trained: Collection[str], folder: str) -> None:
    for name in names:
        if not any(_names(tensor, [name]) for tensor in trained):
            raise CheckpointError(f"{folder}: {name}, which modules_to_save names, has no tensor there")


def _rows(tensors: AdapterTensors, config: Mapping[str, Any], folder: str, *, tied: bool) -> dict[str, TokenRows]:
    indices = token_indices(config)
    out = {}
    for key, what in tensors.of_role("rows").items():
        named = [of for name, of in indices.items() if what.name == name or what.name.endswith(f".{name}")]
        # Beside a tied table the head has the tokens of the embeddings.
        chosen = named[0] if named else next(iter(indices.values()), ())
        count = tensors.files.specs()[key].shape[0]
        if len(chosen) != count:
            raise CheckpointError(
                f"{folder}: {key} has {count} rows, but trainable_token_indices of adapter_config.json names "
                f"{len(chosen)} tokens"
            )
        out[f"{what.name}.weight"] = TokenRows(indices=tuple(chosen), key=key)
    missing = [name for name in indices if not any(table.removesuffix(".weight").endswith(name) for table in out)]
    if missing and not (tied and missing == ["lm_head"] and EMBEDDING in out):
        raise CheckpointError(f"{folder}: trainable_token_indices names {missing[0]}, which has no rows there")
    return out


def _check_rows(tensors: AdapterTensors, rows: Mapping[str, TokenRows], source: TensorSource, folder: str) -> None:
    """Raises CheckpointError for rows that the tables of the changed base do not have."""
    for name, each in rows.items():
        # Before a tied table is made two, the head is the embeddings.
        table = source.specs().get(name, source.specs()[EMBEDDING]).shape
        beyond = [token for token in each.indices if token >= table[0]]
        width = tensors.files.specs()[each.key].shape[1:]
        if beyond or len(set(each.indices)) < len(each.indices) or width != table[1:]:
            problem = (
                f"token {beyond[0]} is beyond the {table[0]} of {name}. {MEND_GROWN}"
                if beyond
                else f"{each.key} has rows of the shape {list(width)}, and {name} {list(table[1:])}"
                if width != table[1:]
                else f"{name} has a token that is named twice"
            )
            raise CheckpointError(f"{folder}: {problem}")


def _has_two_tables(
    tensors: AdapterTensors, trained: Collection[str], rows: Mapping[str, TokenRows], *, ensure: bool
) -> bool:
    """Whether PEFT gives the embeddings and the LM head of a tied base different values."""
    adapted = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors.specs()}
    if adapted & {name.removesuffix(".weight") for name in TABLES}:
        return True
    if any(name in trained for name in TABLES):
        return not ensure
    of_tables = [rows[name].indices for name in TABLES if name in rows]
    return TIED_HEAD in rows and (len(of_tables) == 1 or of_tables[0] != of_tables[1])


def _check_equal(
    tensors: AdapterTensors,
    trained: Mapping[str, str],
    plain: Mapping[str, str],
    rows: Mapping[str, TokenRows],
    folder: str,
) -> None:
    of_rows = {name: each.key for name, each in rows.items()}
    for keys in (trained, plain, of_rows):
        both = [keys[name] for name in TABLES if name in keys]
        if len(both) == 2 and not np.array_equal(tensors.files.read(both[0]), tensors.files.read(both[1])):
            raise CheckpointError(
                f"{folder}: {' and '.join(both)} differ, but in the base they are one tensor (tie_word_embeddings). "
                "Save the base with tie_word_embeddings=false and give it with --base=FOLDER."
            )


def _as_embedding(by_name: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the LM head of a tied base under the name of the embeddings."""
    head = {EMBEDDING: by_name[TIED_HEAD]} if TIED_HEAD in by_name else {}
    return head | {name: value for name, value in by_name.items() if name != TIED_HEAD}


def _is_copy(tensors: AdapterTensors, key: str, base: TensorSource, name: str, *, tied: bool) -> bool:
    """Whether a tensor of the folder is the base's own, rounded as the base is."""
    specs = base.specs()
    name = EMBEDDING if tied and name == TIED_HEAD else name
    shape = tensors.files.specs()[key].shape
    if name not in specs or specs[name].shape != shape:
        return False
    parts = [(slice(at, at + ROWS_AT_A_TIME),) for at in range(0, shape[0], ROWS_AT_A_TIME)] if shape else [()]
    for part in parts:
        theirs, ours = tensors.files.read(key, part), base.read(name, part)
        narrower = min(theirs.dtype, ours.dtype, key=lambda dtype: dtype.itemsize)
        if not np.array_equal(theirs.astype(narrower), ours.astype(narrower)):
            return False
    return True


def _check_shapes(
    source: TensorSource, base: TensorSource, origins: Collection[str], *, untied: bool, folder: str
) -> None:
    specs, own = source.specs(), base.specs()
    problems = [f"unexpected {name} {list(specs[name].shape)}" for name in origins if name not in own and not (
        untied and name == TIED_HEAD
    )]  # fmt: skip
    problems += [
        f"misshapen {name}: file {list(specs[name].shape)}, base {list(own[name].shape)}"
        for name in origins
        if name in own and specs[name].shape[name in TABLES :] != own[name].shape[name in TABLES :]
    ]
    if problems:
        raise CheckpointError(f"the adapter in {folder} does not fit its base:\n{listed(problems, 20, lines=True)}")
    lengths = {name: specs[name].shape[0] for name in TABLES if name in specs}
    if len(set(lengths.values())) > 1:
        raise CheckpointError(
            f"{folder} was trained on a base whose tables were resized, and holds only one of them: "
            f"{EMBEDDING} has {lengths[EMBEDDING]} rows and {TIED_HEAD} {lengths[TIED_HEAD]}. {MEND_GROWN}"
        )


def _notes(base: TensorSource, vocab: int, *, untied: bool, carried: Collection[str], folder: str) -> Iterator[str]:
    before = base.specs()[EMBEDDING].shape[0]
    if vocab != before:
        yield f"{folder} has tables of its own, with {vocab:,} tokens in place of the {before:,} of its base"
    elif carried:
        names = listed(sorted(carried), 4)
        yield f"{folder} has other values of {names} than its base, and does not name them as trained: they replace it"
    if untied:
        yield f"{folder} makes two tables of the one that is embeddings and LM head in its base (tie_word_embeddings)"
