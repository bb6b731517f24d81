"""How layers are divided into stacks, and that running the stacks is running the layers in order."""

import functools
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.nn import stack
from jaxft.nn.stack import group_layers, layout

GEMMA_LIKE = ("local",) * 5 + ("global",)


def executed(segments):
    """Layer numbers in the order in which the stacks run."""
    order = []
    for segment in segments:
        for repeat in zip(*segment.groups, strict=True):
            order += repeat
    return order


@pytest.mark.parametrize("seed", range(40))
def test_every_layer_runs_once_and_in_order(seed):
    rng = random.Random(seed)
    pattern = [rng.choice("abc") for _ in range(rng.randint(1, 6))]
    kinds = (pattern * 9)[: rng.randint(1, 25)] + [rng.choice("abc") for _ in range(rng.randint(0, 3))]
    segments = layout(kinds)
    assert executed(segments) == list(range(len(kinds)))
    for group in group_layers(segments):
        assert len({kinds[i] for i in group}) == 1
    assert [s.first_group for s in segments] == [sum(len(s.groups) for s in segments[:i]) for i in range(len(segments))]
    runs = 1 + sum(a != b for a, b in itertools.pairwise(kinds))
    assert len(group_layers(segments)) <= runs


@pytest.mark.parametrize("layers", [1, 2, 80])
def test_equal_layers_are_one_stack(layers):
    assert group_layers(layout(("layer",) * layers)) == (tuple(range(layers)),)


def test_a_pattern_with_a_remainder():
    groups = group_layers(layout(GEMMA_LIKE * 4 + ("local",) * 2))
    assert groups == (*(tuple(range(p, 24, 6)) for p in range(6)), (24, 25))


def test_two_runs_stay_two_runs():
    assert group_layers(layout(("dense",) * 3 + ("sparse",) * 9)) == ((0, 1, 2), tuple(range(3, 12)))


class Affine(nnx.Module):
    """x -> a x + b: the order of two of them matters."""

    def __init__(self, kind, rngs):
        self.slope = 2.0 if kind == "local" else -1.0
        self.offset = nnx.Param(jax.random.normal(rngs.params(), ()))

    def __call__(self, x, tokens, cache, layer, key, routing):
        return self.slope * x + self.offset.get_value(), cache, routing


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_stacks_compute_what_the_layers_do(remat):
    kinds = GEMMA_LIKE * 2 + ("local",) * 2
    segments, rngs = layout(kinds), nnx.Rngs(params=jax.random.key(0))
    groups = [
        stack.make_group(functools.partial(Affine, kinds[group[0]]), len(group), rngs)
        for group in group_layers(segments)
    ]
    offsets = {
        layer: float(groups[g].offset.get_value()[place])
        for g, group in enumerate(group_layers(segments))
        for place, layer in enumerate(group)
    }
    assert len(set(offsets.values())) == len(kinds)
    expected = 1.0
    for layer, kind in enumerate(kinds):
        expected = (2.0 if kind == "local" else -1.0) * expected + offsets[layer]
    out, cache, routing = stack.run(groups, segments, jnp.ones((1, 1, 1)), None, cache=None, key=None, remat=remat)
    assert cache is None and routing is None
    np.testing.assert_allclose(out[0, 0, 0], expected, rtol=1e-6)
