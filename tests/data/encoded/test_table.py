"""Examples as columns, against the list of the same examples."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from jaxft.config import DataConfig
from jaxft.data.batch import Example
from jaxft.data.encoded.table import Joined, end_to_end, facts_of, hashes_of, join, take, with_pieces
from jaxft.data.encoded.work import from_arrow, map_arrow, to_arrow, write_arrow
from jaxft.data.examine import count_repeated, examine
from jaxft.data.loader import Loader
from jaxft.data.truncation import ModelLimits
from jaxft.errors import DataError
from jaxft.nn.virtual import virtual_ids

STOP = 7


def _examples(count, seed=0, vocab=400, longest=30):
    draw = np.random.default_rng(seed)
    out = []
    for row in range(count):
        tokens = draw.integers(8, vocab, draw.integers(2, longest)).astype(np.int32)
        mask = draw.integers(0, 2, len(tokens)).astype(np.uint8)
        mask[0], mask[1] = 0, 1
        if row % 3:
            tokens[-1], mask[-1] = STOP, 1
        values = {"margin": (float(row),)} if row % 4 else {}
        out.append(Example(tokens=tokens, mask=mask, row=row // 2, part=row % 2, values=values))
    return out


def _table(examples, vocab=400, parts=3):
    edges = np.linspace(0, len(examples), parts + 1).astype(int).tolist()
    return from_arrow(to_arrow(examples[a:b], vocab) for a, b in itertools.pairwise(edges))


def _plain(example):
    return example.tokens.tolist(), example.mask.tolist(), example.row, example.part, example.values


def _same(table, examples):
    assert list(map(_plain, table)) == list(map(_plain, examples))
    assert table[0].tokens.dtype == np.int32 and table[0].mask.dtype == np.uint8
    for name, column in vars(facts_of(examples)).items():
        assert getattr(facts_of(table), name).tolist() == column.tolist(), name
    for ours, theirs in zip(end_to_end(table), end_to_end(examples), strict=True):
        assert ours.dtype == theirs.dtype and ours.tolist() == theirs.tolist()
    assert hashes_of(table).tolist() == hashes_of(examples).tolist()


@pytest.mark.parametrize("vocab", [400, 2**16, 2**16 + 1, 200_000])
def test_a_table_is_the_sequence_of_its_examples(vocab, tmp_path):
    examples = _examples(50, vocab=vocab)
    table = _table(examples, vocab)
    _same(table, examples)
    assert table.parts[0].tokens.dtype == (np.uint16 if vocab <= 2**16 else np.uint32)
    assert _plain(table[-1]) == _plain(examples[-1]) and len(table[10:20]) == 10
    _same(table[10:20], examples[10:20])
    write_arrow(to_arrow(examples, vocab), tmp_path / "rows.arrow")
    _same(from_arrow([map_arrow(tmp_path / "rows.arrow")]), examples)


def test_other_programs_open_the_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    examples = _examples(20)
    write_arrow(to_arrow(examples, 400), tmp_path / "rows.arrow")
    opened = datasets.Dataset.from_file(str(tmp_path / "rows.arrow"))
    assert [row["tokens"] for row in opened] == [example.tokens.tolist() for example in examples]
    assert [row["mask"] for row in opened] == [example.mask.tolist() for example in examples]


def test_selections_and_pieces_are_those_of_the_list():
    examples = _examples(60)
    some = np.array([40, 3, 3, 59])
    _same(take(_table(examples), some), take(examples, some))
    for first in ((), virtual_ids(3)):
        whole = [example.prepend(first) for example in examples]
        table = _table(examples).prepend(first)
        _same(table, whole)
        at = np.array([0, 7, 8, 59])
        # None, one or several in the place of one, all of which begin with the virtual tokens.
        pieces = [
            [replace(whole[i], tokens=whole[i].tokens[: 5 + n], mask=whole[i].mask[: 5 + n]) for n in range(number)]
            for number, i in enumerate(at.tolist())
        ]
        _same(with_pieces(table, at, pieces), with_pieces(whole, at, pieces))
        _same(take(with_pieces(table, at, pieces), some), take(with_pieces(whole, at, pieces), some))


def test_several_tables_are_one_sequence():
    one, two = _examples(20), _examples(31, seed=1)
    joined = join([_table(one), _table(two)])
    assert isinstance(joined, Joined)
    _same(joined, [*one, *two])
    _same(joined[15:25], [*one, *two][15:25])
    assert _plain(joined[-1]) == _plain(two[-1]) and join([one]) is one
    with pytest.raises(IndexError):
        joined[51]


@pytest.mark.parametrize("truncation", ["refuse", "drop", "right", "left", "windows"])
@pytest.mark.parametrize("packing", [True, False])
def test_examinations_and_batches_are_those_of_the_list(truncation, packing):
    examples = [replace(example, values={}) for example in _examples(80)]  # of a batch, all have the same
    config = DataConfig(
        train="x", max_length=64 if truncation == "refuse" else 20, truncation=truncation, packing=packing
    )
    kept, one = examine(_table(examples), config, model=ModelLimits(stop_ids=frozenset({STOP})), where=str)
    expected, other = examine(examples, config, model=ModelLimits(stop_ids=frozenset({STOP})), where=str)
    assert one == other
    _same(kept, list(expected))
    loaders = [Loader(x, batch_size=4, max_length=config.max_length, packing=packing, seed=3) for x in (kept, expected)]
    for step in (0, 3, 50):
        for ours, theirs in zip(*(loader.batch(step)[:5] for loader in loaders), strict=True):
            assert np.array_equal(ours, theirs)
    assert loaders[0]._stream.totals(17) == loaders[1]._stream.totals(17)


def test_refusals_name_the_same_rows():
    examples = _examples(30)
    examples[4] = Example(tokens=np.arange(8, 12, dtype=np.int32), mask=np.zeros(4, np.uint8), row=2)
    for table in (examples, _table(examples)):
        with pytest.raises(DataError, match="1 of 15 rows of the data train on zero tokens: row 2"):
            examine(table, DataConfig(), model=ModelLimits(stop_ids=frozenset({STOP})), where=lambda row: f"row {row}")
        with pytest.raises(DataError, match="examples of the data are longer than data.max_length=9; the longest, row"):
            config = DataConfig(max_length=9)
            examine(
                take(table, np.arange(5, 30)),
                config,
                model=ModelLimits(stop_ids=frozenset({STOP})),
                where=lambda row: f"row {row}",
            )


def test_repeated_rows_are_counted_token_for_token():
    train, held_out = _examples(40), _examples(10, seed=5)
    held_out[3], held_out[7] = train[11], train[12]
    sets = {tuple(example.tokens.tolist()) for example in train}
    expected = sum(tuple(example.tokens.tolist()) in sets for example in held_out)
    assert count_repeated(_table(train), _table(held_out)) == count_repeated(train, held_out) == expected >= 2
