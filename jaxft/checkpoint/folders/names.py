"""Tensors under the names of other savers, and heads that a config does not expect, under the names of our models.

Bodies saved alone (`LlamaModel.save_pretrained`) lack the prefix `model.`; wrappers of torch leave their own prefixes.
"""

import re
from collections.abc import Mapping

import numpy as np

from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import CheckpointError, did_you_mean, listed
from jaxft.models.family import FamilyConfig

BODY, HEAD, EMBEDDING = "model.", "lm_head.weight", "model.embed_tokens.weight"
# torch.compile, DistributedDataParallel, activation checkpointing and FSDP put these before what they wrap.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(_orig_mod|module|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
# Parts of a body that was saved alone.
BARE = re.compile(r"(language_model\.)?(embed_tokens|layers\.\d+|norm)\..+")
# What trainers of value models put on top: TRL's head is a linear layer of its own, beside the language model.
VALUE_HEAD = re.compile(r"(v_head|value_head)\..+")
WITH_VALUE_HEAD = "pretrained_model."  # TRL's name of the language model beside it
ROWS = 4096  # of two tables compared at a time


class Renamed:
    """A source under other names. names: the name in the source of each tensor."""

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, dict(names)

    def specs(self) -> dict[str, TensorSpec]:
        specs = self._source.specs()
        return {name: specs[source_name] for name, source_name in self._names.items()}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        if name not in self._names:
            raise CheckpointError(f"no tensor {name!r}.{did_you_mean(name, self._names)}")
        return self._source.read(self._names[name], index)


def with_usual_names(source: TensorSource) -> TensorSource:
    """The source without wrappers' prefixes, and with `model.` before the names of a body that was saved alone.

    Raises CheckpointError if two tensors would get one name.
    """
    names: dict[str, str] = {}
    plain = {name: WRAPPERS.sub("", name) for name in source.specs()}
    if any(name.startswith(WITH_VALUE_HEAD + BODY) for name in plain.values()):
        plain = {source_name: name.removeprefix(WITH_VALUE_HEAD) for source_name, name in plain.items()}
    has_body = any(name.startswith(BODY) for name in plain.values())
    for source_name, name in plain.items():
        new = name if has_body or not BARE.fullmatch(name) else BODY + name
        if new in names:
            raise CheckpointError(f"tensor {new!r} is there as {names[new]!r} and as {source_name!r}")
        names[new] = source_name
    return source if all(name == source_name for name, source_name in names.items()) else Renamed(source, names)


def with_names_of(config: FamilyConfig, source: TensorSource) -> TensorSource:
    """The source under the names that a family's tensors have here, where those in files are others."""
    names = {config.from_files(name): name for name in source.specs()} if config.names_in_files else {}
    return Renamed(source, names) if names else source


def without_value_head(source: TensorSource) -> tuple[TensorSource, str | None]:
    """The source without the tensors of a trainer's value head, and a sentence on them; None if there are none."""
    head = [name for name in source.specs() if VALUE_HEAD.fullmatch(name)]
    if not head:
        return source, None
    kept = Renamed(source, {name: name for name in source.specs() if name not in head})
    return kept, f"left out: {listed(head)}, the value head that a trainer put beside the language model"


def with_own_head(tied: bool, source: TensorSource) -> tuple[bool, TensorSource, str | None]:
    """(whether the model is tied, the source, a sentence if config.json says otherwise) of a language model.

    tied: by config.json. A head that equals the embedding is left out; one that differs makes two tables, as in
    transformers 5; a single table under the head's name is the embedding. Raises CheckpointError for an untied model
    without a head, for which a reader would have to invent one.
    """
    specs = source.specs()
    if not tied:
        if HEAD not in specs and EMBEDDING in specs:
            raise CheckpointError(
                f"missing lm_head.weight {list(specs[EMBEDDING].shape)}: config.json does not tie it to the embedding. "
                "If they are one table, set tie_word_embeddings to true in config.json; if this is the body of a model "
                "without its head, take the whole model. A reward model (method.name='reward') needs no LM head"
            )
        return False, source, None
    if HEAD not in specs:
        return True, source, None
    names = {name: name for name in specs if name != HEAD}
    if EMBEDDING not in specs:
        return True, Renamed(source, names | {EMBEDDING: HEAD}), None
    if _equal_tables(source):
        return True, Renamed(source, names), None
    return False, source, "lm_head.weight differs from the embedding, although config.json ties them: both are read"


def _equal_tables(source: TensorSource) -> bool:
    head, table = source.specs()[HEAD], source.specs()[EMBEDDING]
    cuts = [(slice(row, row + ROWS),) for row in range(0, head.shape[0], ROWS)]
    # Almost always the first block tells them apart.
    return head.shape == table.shape and all(
        np.array_equal(source.read(HEAD, cut), source.read(EMBEDDING, cut)) for cut in cuts
    )
