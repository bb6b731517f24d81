"""Scores of answers by a reward model, and the best of several answers that are generated to a prompt."""

# B batch, P documents that a row can hold

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxft.checkpoint.load import LoadedModel
from jaxft.config import DataConfig, MeshConfig
from jaxft.data import Tokenizer
from jaxft.data.batch import Batch, Example, assemble
from jaxft.data.chat.encode import encode, encode_all
from jaxft.data.formats import Conversation, conversation_of
from jaxft.data.packing import pack
from jaxft.data.preferences import read_pairs
from jaxft.data.preferences.rows import preferences_of
from jaxft.data.prepare import read_all
from jaxft.data.rows.values import RowProblem
from jaxft.data.sources import Rows, Subset, open_rows
from jaxft.errors import ConfigError, DataError, ModelError, counted, listed
from jaxft.generation.settings import Sampling
from jaxft.generation.text import Prompt, as_prompts, encode_prompt, generate_text
from jaxft.objectives.reward import document_scores
from jaxft.sharding.arrays import to_host
from jaxft.sharding.mesh import MeshPlan, make_mesh_plan

STEP = 64  # row lengths are multiples of it, so that few are compiled and every mesh can split them
FULL_ROW = 1024  # tokens of a row that short documents share


@dataclass(frozen=True, kw_only=True)
class Best:
    """The answers to one prompt. text, score: of the one with the largest score. texts, scores: of all, as drawn."""

    text: str
    score: float
    texts: tuple[str, ...]
    scores: tuple[float, ...]


class GivenRows:
    """Rows that are in memory."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self._rows[index])

    def where(self, index: int) -> str:
        return f"row {index}"

    def describe(self) -> str:
        return counted(len(self), "row")

    def digest(self) -> str:
        return hashlib.sha256(json.dumps([dict(row) for row in self._rows], default=str).encode()).hexdigest()


def score(
    model: LoadedModel,
    tokenizer: Tokenizer,
    rows: str | Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    split: str = "train",
    limit: int | None = None,
    **columns: Any,
) -> list[dict[str, Any]]:
    """The scores of rows, in their order: `{"row": 0, "score": 1.5}` each, or for rows of pairs of answers
    `{"row": 0, "chosen": 1.5, "rejected": -0.5, "right": True}`, where `right` says that the chosen one has the larger.

    rows: what `data.train` names, or mappings; messages, prompt and completion, or any form of pairs. The score of a
    row of messages is that of its last answer, given all before it. batch_size: packed sequences at a time. split: of a
    set with several. limit: rows that are used, from the first. columns: fields of `data` in a config that say how rows
    are read, such as prompt_field="question". A model on a mesh scores on its devices. Raises ModelError if the model
    has no score head, and DataError, naming the row, if one cannot be read or is longer than the model's positions.
    """
    check_head(model)
    config = replace(DataConfig(), train_on="last", **columns)
    opened: Rows = open_rows(rows, split=split) if isinstance(rows, str) else GivenRows(rows)
    if limit is not None:
        opened = Subset(opened, range(min(limit, len(opened))), f"first {counted(limit, 'row')}")
    if not len(opened):
        raise DataError(f"{opened.describe()}: there is nothing to score")
    pairs = _is_preference(opened[0], config)
    read = read_all(opened, config, tokenizer, read_pairs if pairs else conversation_of)
    examples = list(encode_all(read, tokenizer, config))
    if len(examples) != len(read):
        raise DataError("the chat template cuts an answer into several sequences, which have no single score")
    names = [conversation.where for conversation in read]
    scores = _scores(model, examples, names, batch_size).tolist()
    if not pairs:
        return [{"row": one.row, "score": value} for one, value in zip(read, scores, strict=True)]
    return [
        {"row": one.row, "chosen": chosen, "rejected": rejected, "right": chosen > rejected}
        for one, chosen, rejected in zip(read[::2], scores[::2], scores[1::2], strict=True)
    ]


def best_of(
    model: LoadedModel,
    tokenizer: Tokenizer,
    reward_model: LoadedModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    n: int,
    reward_tokenizer: Tokenizer | None = None,
    slots: int = 32,
    **sampling: Any,
) -> Best | list[Best]:
    """The best of n answers that the model draws to each prompt, by the scores of a reward model.

    prompts: as for `generate`; a single one gives a single result. Thoughts before an answer in a chat are no part of
    it, and are not scored. n: 2 or more. reward_tokenizer: of the reward model, which may have another vocabulary
    and chat template; `tokenizer` if None. sampling: fields of `Sampling`; the temperature is 1 by default. An answer
    is scored with an end token, also if it was cut at max_new_tokens. Raises ConfigError for n below 2 and for a
    temperature of 0, at which all answers are the same; ModelError if the reward model has no score head.
    """
    check_head(reward_model)
    settings = Sampling(**{"temperature": 1.0, **sampling})
    if n < 2:
        raise ConfigError(f"the best of {n} answers needs no reward model: draw 2 or more")
    if settings.temperature == 0:
        raise ConfigError(
            "temperature=0 takes the most probable token, so that all answers to a prompt are the same. Set it to 1, "
            "or to another number above 0."
        )
    prompt_list, single = as_prompts(prompts)
    drawn = [prompt for prompt in prompt_list for _ in range(n)]
    texts = [done.text or "" for done in generate_text(model.module, tokenizer, drawn, settings, slots=slots)]
    names = [f"answer {index % n} to prompt {index // n}" for index in range(len(drawn))]
    scores = answer_scores(reward_model, reward_tokenizer or tokenizer, drawn, texts, names).tolist()
    out = []
    for start in range(0, len(drawn), n):
        own_texts, own_scores = tuple(texts[start : start + n]), tuple(scores[start : start + n])
        best = int(np.argmax(own_scores))
        out.append(Best(text=own_texts[best], score=own_scores[best], texts=own_texts, scores=own_scores))
    return out[0] if single else out


def answer_scores(
    reward_model: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    names: Sequence[str],
) -> np.ndarray:
    """The score of each answer by a reward model, [N] float32. tokenizer: its own. names: of the answers, for errors.

    An answer is scored with an end token, also if it was cut off.
    """
    documents = [_document(tokenizer, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    examples = [Example(tokens=np.array(d, np.int32), mask=np.zeros(len(d), np.uint8), row=0) for d in documents]
    return _scores(reward_model, examples, names, batch_size=8)


def check_head(model: LoadedModel) -> None:
    """Raises ModelError unless the model is a reward model."""
    if model.module.config.head != "score":
        raise ModelError(
            f"{model.adapter or model.base} is a language model, which has no score head. Give a reward model: a "
            "folder that a run with method.name='reward' wrote, or a `*ForSequenceClassification` with one label."
        )


def _is_preference(row: Mapping[str, Any], config: DataConfig) -> bool:
    try:
        preferences_of(row, config, Counter())
    except RowProblem:
        return False
    return True


def _document(tokenizer: Tokenizer, prompt: Prompt, answer: str) -> list[int]:
    """Prompt and answer as the reward model reads a row of them, whatever tokens the answer begins with."""
    end = tokenizer.eos_id
    if not isinstance(prompt, str):
        messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
        (example,) = encode(Conversation(row=0, where="a probe", format="messages", messages=messages), tokenizer)
        end = int(example.tokens[-1])
    return [*encode_prompt(tokenizer, prompt), *tokenizer.encode(answer), *([] if end is None else [end])]


def _scores(model: LoadedModel, examples: Sequence[Example], names: Sequence[str], batch_size: int) -> np.ndarray:
    """The score of each document, [N] float32, computed in packed batches on the devices that the model is on.

    names: of the documents, for errors. batch_size: sequences at a time.
    """
    limit = model.module.config.max_position_embeddings
    long = [f"{name} ({len(one)})" for name, one in zip(names, examples, strict=True) if len(one) > limit]
    if long:
        raise DataError(
            f"{len(long):,} documents have more tokens than the model's {limit} positions: {listed(long, 5)}. "
            "Shorten or remove them."
        )
    vocab = model.module.config.vocab_size
    strange = [name for name, one in zip(names, examples, strict=True) if one.tokens.max() >= vocab]
    if strange:
        raise DataError(
            f"{len(strange):,} documents contain token ids beyond the {vocab:,} rows of the model's embedding table: "
            f"{listed(strange, 5)}. Use the tokenizer files that the model was published with."
        )
    lengths = [max(2, len(one)) for one in examples]  # a row has at most one document for every two tokens
    length = -(-max(*lengths, min(sum(lengths), FULL_ROW)) // STEP) * STEP
    plan = pack(lengths, length)
    mesh = mesh_of(model.module)
    shards = mesh.batch_shards
    rows = -(-min(batch_size, len(plan)) // shards) * shards
    graphdef, state = nnx.split(model.module)

    def compute(state: nnx.State, batch: Batch[jax.Array]) -> jax.Array:
        return document_scores(nnx.merge(graphdef, state), batch)

    step, scores = jax.jit(mesh.bind(compute)), np.zeros(len(examples), np.float32)
    for start in range(0, len(plan), rows):
        sequences = plan[start : start + rows]
        packed = [[examples[index] for index in sequence] for sequence in sequences]
        batch = assemble(packed + [[]] * (rows - len(packed)), length)
        values_BP = to_host(step(state, jax.device_put(batch, mesh.batch_sharding())))
        for row, sequence in enumerate(sequences):
            scores[sequence] = values_BP[row, : len(sequence)]
    return scores


def mesh_of(module: nnx.Module) -> MeshPlan:
    """The mesh that the parameters are on."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(nnx.state(module)))
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)
    return MeshPlan(mesh=mesh) if isinstance(mesh, Mesh) else make_mesh_plan(MeshConfig(), jax.devices()[:1])
