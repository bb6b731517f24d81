"""Path rules: suffix globs, right-aligned specs, and refusals that say how to mend."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxft.errors import ConfigError
from jaxft.sharding.rules import RULES, Leaf, assign, matches
from jaxft.trees import path_str

ONE_EACH = {"slice": 1, "data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 1}
AXES = ONE_EACH | {"fsdp": 8}


def specs(shapes, rules=RULES, axes=AXES):
    leaves = [Leaf(path, shape, True) for path, shape in shapes.items()]
    return dict(zip(shapes, assign(leaves, rules, axes), strict=True))


class Pair(NamedTuple):
    first: object
    second: object


def paths(tree):
    return [path_str(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def test_path_str_of_each_kind_of_container():
    assert paths({"a": [1, Pair(2, {"b": 3})]}) == ["a/0", "a/1/first", "a/1/second/b"]
    assert path_str(()) == ""


def test_path_str_of_nnx_state_and_its_optimizer_moments():
    model = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])
    state = nnx.state(model)
    assert paths(state) == ["0/bias", "0/kernel"]
    moments = paths({"opt_state": optax.adam(1e-3).init(state)})
    assert "opt_state/0/mu/0/kernel" in moments


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("kernel", "trainable/layers/0/q_proj/kernel", True),
        ("q_proj/kernel", "opt_state/0/mu/layers/0/q_proj/kernel", True),
        ("layers/*/q_proj/kernel", "trainable/layers/0/q_proj/kernel", True),
        ("*_proj/kernel", "layers/0/down_proj/kernel", True),
        ("kernel", "layers/0/my_kernel", False),
        ("q_proj/kernel", "kernel", False),
        ("layers/*/kernel", "layers/0/q_proj/kernel", False),
        ("kernel", "kernel/scale", False),
    ],
)
def test_matches(pattern, path, expected):
    assert matches(pattern, path) is expected


def test_default_rules_split_the_model_dimension():
    got = specs(
        {
            "frozen/embed/embedding": (50257, 64),
            "frozen/lm_head/kernel": (64, 50257),
            "frozen/layers/0/q_proj/kernel": (4, 64, 128),
            "frozen/layers/0/o_proj/kernel": (4, 128, 64),
            "frozen/layers/0/down_proj/kernel": (4, 172, 64),
            "frozen/layers/0/gate_proj/kernel": (4, 64, 172),
            "frozen/layers/0/norm/scale": (4, 64),
            "trainable/layers/0/q_proj/lora_a": (4, 16, 64),
            "trainable/layers/0/q_proj/lora_b": (4, 16, 128),
            "trainable/lm_head/lora_a": (16, 64),
            "opt_state/0/mu/layers/0/q_proj/lora_a": (4, 16, 64),
            "opt_state/0/count": (),
            "key": (2,),
        }
    )
    assert got == {
        "frozen/embed/embedding": P(None, "fsdp"),
        "frozen/lm_head/kernel": P("fsdp"),
        "frozen/layers/0/q_proj/kernel": P(None, "fsdp"),
        "frozen/layers/0/o_proj/kernel": P(None, None, "fsdp"),
        "frozen/layers/0/down_proj/kernel": P(None, None, "fsdp"),
        "frozen/layers/0/gate_proj/kernel": P(None, "fsdp"),
        "frozen/layers/0/norm/scale": P(None, "fsdp"),
        "trainable/layers/0/q_proj/lora_a": P(None, None, "fsdp"),
        "trainable/layers/0/q_proj/lora_b": P(None, None, "fsdp"),
        "trainable/lm_head/lora_a": P(None, "fsdp"),
        "opt_state/0/mu/layers/0/q_proj/lora_a": P(None, None, "fsdp"),
        "opt_state/0/count": P(),
        "key": P(),
    }


def test_first_match_wins():
    rules = [("q_proj/kernel", P(None, "fsdp")), ("kernel", P("fsdp", None))]
    got = specs({"q_proj/kernel": (8, 16), "k_proj/kernel": (8, 16)}, rules)
    assert got == {"q_proj/kernel": P(None, "fsdp"), "k_proj/kernel": P("fsdp")}


def test_several_axes_on_one_dimension():
    got = specs({"w": (16, 4)}, [("w", P(("data", "fsdp"), None))], {"data": 2, "fsdp": 4})
    assert got == {"w": P(("data", "fsdp"))}


def test_keys_are_never_split():
    leaf = Leaf("a/kernel", (8, 8), splittable=False)
    assert assign([leaf], RULES, AXES) == [P()]


def test_a_big_array_that_does_not_divide_is_refused_with_the_sizes_that_fit():
    with pytest.raises(ConfigError) as caught:
        specs({"layers/q_proj/kernel": (2, 4096, 64)}, axes=ONE_EACH | {"data": 1, "fsdp": 6})
    text = str(caught.value)
    assert "layers/q_proj/kernel [2, 4096, 64]: fsdp=6 does not divide dimension 1 = 4096" in text
    assert "one of 1, 2:" in text and "the 6 devices" in text


def test_a_small_array_that_does_not_divide_stays_whole_and_is_reported(caplog):
    assert specs({"norm/scale": (2, 30)}) == {"norm/scale": P()}
    assert "norm/scale [2, 30]: fsdp=8 does not divide dimension 1 = 30" in caplog.text


def test_a_spec_of_too_many_dimensions(caplog):
    rules = [("w", P(None, None, "fsdp"))]
    assert specs({"w": (8, 8)}, rules) == {"w": P()}
    assert "has 2 dimensions, its rule" in caplog.text
    with pytest.raises(ConfigError, match=r"w \[512, 512\]: has 2 dimensions, its rule .* names 3"):
        specs({"w": (512, 512)}, rules)


def test_a_big_array_left_whole_is_refused_with_its_size_when_fsdp_is_above_one():
    shapes = {"layers/0/q_proj/kernel": (2, 64, 64), "layers/0/weird": (512, 512)}
    with pytest.raises(ConfigError, match=r"(?s)fsdp=8.*layers/0/weird \[512, 512\]: 262,144 elements"):
        specs(shapes)
    with pytest.raises(ConfigError, match="weird"):
        specs({"weird": (512, 512)}, [("weird", P())])
    assert specs(shapes, axes=ONE_EACH | {"data": 8, "fsdp": 1})["layers/0/weird"] == P()


def test_rules_without_effect_are_refused_with_the_nearest_path():
    rules = [("q_porj/kernel", P("fsdp", None)), ("kernel", P("fsdp", None)), ("k_proj/kernel", P())]
    with pytest.raises(ConfigError) as caught:
        specs({"layers/q_proj/kernel": (8, 8), "layers/k_proj/kernel": (8, 8)}, rules)
    text = str(caught.value)
    assert "'q_porj/kernel': matches no array. Did you mean 'q_proj/kernel'?" in text
    assert "'k_proj/kernel': an earlier rule takes all that it matches" in text


def test_a_rule_of_an_unknown_axis_is_refused():
    with pytest.raises(ConfigError, match=r"'kernel' names mesh axis 'fspd'; .* Did you mean 'fsdp'\?"):
        specs({"kernel": (8, 8)}, [("kernel", P("fspd", None))])


def test_splittable_default_rules_fit_real_norm_stacks():
    # 32 layers of 4096: more than 2**16 elements, so a whole copy per device would be refused
    assert specs({"layers/norm/scale": (32, 4096)}) == {"layers/norm/scale": P(None, "fsdp")}
    assert jnp.prod(jnp.array((32, 4096))) > 2**16
