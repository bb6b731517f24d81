"""Sampled answers packed so that the answers to one prompt share its tokens (`WholeDocuments`)."""

# B rows, S sequence, W rows of whole documents for each row, n answers

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from jaxft.data.batch import Example, assemble
from jaxft.data.packing import pack
from jaxft.nn.whole_documents import WholeDocuments
from jaxft.rollouts.packed import PackedRollouts, Span, round_up
from jaxft.rollouts.rollout import Rollout


@dataclass
class _Row:
    """A row while it is filled: its answers, in runs that share a prompt, and the tokens that are left."""

    left: int
    runs: list[list[int]] = field(default_factory=list)


def pack_with_shared_prompts(
    rollouts: Sequence[Rollout], *, max_length: int, pad_id: int, multiple: int = 1
) -> PackedRollouts:
    """The rollouts as documents of rows in which the answers of a group share their prompt, with `Batch.whole`.

    A group is divided among rows if it does not fit into one; each of them has the prompt. The first document of a
    group in a row is prompt and answer. The others are an answer after the last token of the prompt, from which its
    first token is predicted. multiple: as of `pack_rollouts`. Raises ValueError if a prompt with its answer is longer
    than max_length.
    """
    rows = _rows(rollouts, max_length)
    spans: dict[int, Span] = {}
    documents: list[list[Example]] = []
    for number, row in enumerate(rows):
        documents.append([])
        start = 0
        for index, prompt in _documents(rollouts, row):
            example = _cut(rollouts[index].example({}), len(rollouts[index].prompt) - prompt)
            spans[index] = Span(row=number, document=len(documents[-1]), start=start, prompt=prompt)
            documents[-1].append(example)
            start += len(example)
    documents += [[]] * (round_up(len(rows), multiple) - len(rows))
    batch = assemble(documents, max_length, pad_id, documents[0][0])
    positions_BS = batch.positions_BS.copy()
    for index, span in spans.items():
        end = span.start + span.prompt + len(rollouts[index].tokens)
        positions_BS[span.row, span.start : end] += len(rollouts[index].prompt) - span.prompt
    whole = _whole_documents(rollouts, rows, spans, batch.tokens_BS.shape)
    return PackedRollouts(
        rollouts=tuple(rollouts),
        spans=tuple(spans[index] for index in range(len(rollouts))),
        batch=batch._replace(positions_BS=positions_BS, whole=whole),
    )


def _rows(rollouts: Sequence[Rollout], max_length: int) -> list[_Row]:
    """The answers of every row. A group goes into the fullest row that has room for all of it, else into the one with
    the most room, as far as it fits there, and so on.
    """
    rows: list[_Row] = []
    for group in _groups(rollouts):
        prompt = len(rollouts[group[0]].prompt)
        while group:
            costs = np.cumsum([len(rollouts[index].tokens) + 1 for index in group]) + prompt - 1
            if prompt + len(rollouts[group[0]].tokens) > max_length:
                raise ValueError(
                    f"answer {group[0]} has {prompt + len(rollouts[group[0]].tokens)} tokens with its prompt, more "
                    f"than max_length={max_length}"
                )
            fitting = [row for row in rows if costs[0] <= row.left]
            holding = [row for row in fitting if costs[-1] <= row.left]
            if holding:
                row = min(holding, key=lambda row: row.left)
            elif fitting:
                row = max(fitting, key=lambda row: row.left)
            else:
                row = _Row(max_length)
                rows.append(row)
            count = int(np.searchsorted(costs, row.left, side="right"))
            row.runs.append(group[:count])
            row.left -= int(costs[count - 1])
            group = group[count:]
    return rows


def _groups(rollouts: Sequence[Rollout]) -> list[list[int]]:
    """Answers that follow each other and have the same prompt, token for token, by index."""
    groups: list[list[int]] = []
    for index, one in enumerate(rollouts):
        if groups and np.array_equal(rollouts[groups[-1][0]].prompt.tokens, one.prompt.tokens):
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _documents(rollouts: Sequence[Rollout], row: _Row) -> Iterator[tuple[int, int]]:
    """(answer, tokens of its prompt in its document) for the documents of a row, in order."""
    for run in row.runs:
        for number, index in enumerate(run):
            yield index, len(rollouts[index].prompt) if number == 0 else 1


def _cut(example: Example, count: int) -> Example:
    """A document without its first `count` tokens."""
    arrays = {name: values[count:] for name, values in example.arrays.items()}
    return replace(example, tokens=example.tokens[count:], mask=example.mask[count:], arrays=arrays)


def _whole_documents(
    rollouts: Sequence[Rollout], rows: Sequence[_Row], spans: dict[int, Span], shape: tuple[int, ...]
) -> WholeDocuments[np.ndarray]:
    """Whole documents of length at most S, packed into as few rows as the fullest row of the batch needs."""
    plans = []
    for row in rows:
        answers = [index for run in row.runs for index in run]
        lengths = [len(rollouts[index].prompt) + len(rollouts[index].tokens) for index in answers]
        plans.append([[answers[at] for at in indices] for indices in pack(lengths, shape[1])])
    ways = round_up(max(len(plan) for plan in plans))
    index_BWS = np.zeros((shape[0], ways, shape[1]), np.int32)
    segments_BWS = np.zeros_like(index_BWS)
    back_BS = np.zeros(shape, np.int32)
    for number, (plan, filled) in enumerate(zip(plans, rows, strict=True)):
        first = {index: run[0] for run in filled.runs for index in run}
        for way, answers in enumerate(plan):
            start = 0
            for segment, index in enumerate(answers, 1):
                positions = _positions(rollouts[index], spans[index], spans[first[index]])
                here = slice(start, start + len(positions))
                index_BWS[number, way, here], segments_BWS[number, way, here] = positions, segment
                # Only its own tokens are taken back from a document: shared ones come from the first.
                own = len(positions) - spans[index].prompt - len(rollouts[index].tokens)
                back_BS[number, positions[own:]] = way * shape[1] + start + np.arange(own, len(positions))
                start += len(positions)
    return WholeDocuments(index_BWS=index_BWS, segments_BWS=segments_BWS, back_BS=back_BS)


def _positions(one: Rollout, span: Span, first: Span) -> np.ndarray:
    """Where the tokens of prompt and answer are in the row. first: the document that has the prompt."""
    shared = np.arange(first.start, first.start + len(one.prompt) - span.prompt)
    return np.concatenate([shared, np.arange(span.start, span.start + span.prompt + len(one.tokens))])
