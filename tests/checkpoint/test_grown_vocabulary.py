"""Rows that are drawn for added tokens: the mean of the known rows, the same in every block of a table."""

import numpy as np
import pytest
from transformers import LlamaConfig

from jaxft.checkpoint.derived.grown_vocabulary import CHUNK, TABLES, GrownVocabulary
from jaxft.checkpoint.tensors import TensorSpec, block_bounds
from jaxft.data.tokenizers.table import AddedRows, added_rows
from jaxft.errors import CheckpointError

EMBED, HEAD = TABLES


class Arrays:
    """A source of arrays in memory, which counts what is read."""

    def __init__(self, **arrays):
        self.arrays, self.read_rows = arrays, 0

    def specs(self):
        return {name: TensorSpec(array.shape, array.dtype) for name, array in self.arrays.items()}

    def read(self, name, index=None):
        bounds = block_bounds(self.arrays[name].shape, index)
        self.read_rows += bounds[0][1] - bounds[0][0]
        return self.arrays[name][tuple(slice(*one) for one in bounds)].copy()


def source_of(rows=50, width=6, head=True, dtype=np.float32):
    generator = np.random.default_rng(0)
    names = TABLES if head else TABLES[:1]
    arrays = {name: (generator.standard_normal((rows, width)) + 3).astype(dtype) for name in names}
    return Arrays(**arrays, other=np.arange(6.0).reshape(2, 3))


def test_fresh_rows_are_the_mean_of_the_known_ones_and_differ():
    source = source_of()
    grown = GrownVocabulary(source, AddedRows(fresh=(50, 51, 52), tokens=(50, 51), rows=53, before=50, known=40), 1)
    assert {name: spec.shape for name, spec in grown.specs().items()} == {
        EMBED: (53, 6),
        HEAD: (53, 6),
        "other": (2, 3),
    }
    for name in TABLES:
        table = grown.read(name)
        np.testing.assert_array_equal(table[:50], source.arrays[name])
        known = source.arrays[name][:40].astype(np.float64)
        distance = np.abs(table[50:] - known.mean(0)) / known.std(0)
        assert 0 < distance.max() < 6e-5
        assert len({row.tobytes() for row in table[50:]}) == 3
    assert grown.read(EMBED)[51].tobytes() != grown.read(HEAD)[51].tobytes()
    np.testing.assert_array_equal(grown.read("other", (slice(1, 2),)), [[3, 4, 5]])


def test_the_mean_is_that_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    tables = {EMBED: model.get_input_embeddings(), HEAD: model.get_output_embeddings()}
    source = Arrays(**{name: module.weight.detach().numpy().copy() for name, module in tables.items()})
    grown = GrownVocabulary(source, added_rows(tokens=(40, 41), size=42, before=40), 0)
    torch.manual_seed(0)
    model.resize_token_embeddings(64, mean_resizing=True)
    for name, module in (EMBED, model.get_input_embeddings()), (HEAD, model.get_output_embeddings()):
        # Both add noise; theirs has the variance of the rows times 1e-9, ours their deviation times 1e-5.
        np.testing.assert_allclose(grown.read(name), module.weight.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_block_is_a_part_of_the_whole(dtype):
    added = added_rows(tokens=range(44, 56), size=56, before=50)
    assert added.fresh == tuple(range(44, 64)) and added.rows == 64 and added.known == 44 and added.grows
    whole = GrownVocabulary(source_of(dtype=dtype), added, 3).read(EMBED)
    assert whole.dtype == dtype
    for rows in (slice(0, 20), slice(40, 47), slice(48, 53), slice(50, 56), slice(63, 64)):
        for columns in (slice(0, 6), slice(2, 3), slice(3, 6)):
            block = GrownVocabulary(source_of(dtype=dtype), added, 3).read(EMBED, (rows, columns))
            np.testing.assert_array_equal(block, whole[rows, columns])


def test_padded_rows_that_a_token_takes_are_drawn_and_others_stay():
    source = source_of(rows=50)
    added = added_rows(tokens=(44, 45), size=46, before=50)
    assert not added.grows
    table = GrownVocabulary(source, added, 0).read(EMBED)
    assert table.shape == (50, 6)
    assert (table[44:46] != source.arrays[EMBED][44:46]).all()
    np.testing.assert_array_equal(np.delete(table, (44, 45), 0), np.delete(source.arrays[EMBED], (44, 45), 0))


def test_the_statistics_are_read_once_and_in_parts():
    source = source_of(rows=CHUNK + 100, head=False)
    grown = GrownVocabulary(source, added_rows(tokens=range(8250, 9000), size=9000, before=CHUNK + 100), 0)
    first = grown.read(EMBED, (slice(8990, 9000),))
    assert source.read_rows == 8250
    np.testing.assert_array_equal(grown.read(EMBED, (slice(8990, 9000),)), first)
    assert source.read_rows == 8250
    np.testing.assert_allclose(first, np.tile(source.arrays[EMBED][:8250].mean(0), (10, 1)), atol=1e-4)
    assert set(grown.specs()) == {EMBED, "other"}


def test_a_table_of_another_size_than_the_config_says_is_refused():
    grown = GrownVocabulary(source_of(rows=50), added_rows(tokens=(48,), size=49, before=48), 0)
    with pytest.raises(
        CheckpointError, match="model.embed_tokens.weight has 50 rows, but vocab_size of config.json is 48"
    ):
        grown.read(EMBED)
