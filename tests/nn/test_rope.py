"""Rotary embeddings: frequencies against transformers, and what a rotation must leave alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxft.nn.attention import turning
from jaxft.nn.attention.rope import Rope, rotate, rotation

AXES = ("slice", "data", "fsdp", "expert", "context", "tensor")

LLAMA3 = Rope(
    theta=5e5, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
KINDS = [Rope(theta=10000.0), Rope(theta=1e6, kind="linear", factor=4.0), LLAMA3]


@pytest.mark.parametrize("rope", KINDS, ids=lambda rope: rope.kind)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_frequencies_equal_transformers(rope, head_dim):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=131072,
        rope_parameters={"rope_theta": rope.theta} | (rope.to_hf()["rope_scaling"] or {"rope_type": "default"}),
    )  # fmt: skip
    expected = LlamaRotaryEmbedding(config).inv_freq.numpy()
    np.testing.assert_allclose(rope.frequencies(head_dim), expected, rtol=2e-6)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    "scaling",
    [
        YARN,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        YARN | {"attention_factor": 1.25},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.1},
        {k: v for k, v in YARN.items() if k != "original_max_position_embeddings"} | {"partial_rotary_factor": 0.5},
        LONG,
        LONG | {"partial_rotary_factor": 0.75},
        LONG | {"factor": 2.0},
        LONG | {"attention_factor": 1.5},
        {"rope_type": "proportional", "partial_rotary_factor": 0.25},
        {"rope_type": "proportional", "factor": 2.0},
    ],
    ids=str,
)
def test_scalings_equal_transformers(scaling, long):
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head_dim, kind = 64, scaling["rope_type"]
    if kind == "longrope":
        turned = int(head_dim * scaling.get("partial_rotary_factor", 1.0)) // 2
        scaling = scaling | {"short_factor": [1.0 + i / 7 for i in range(turned)], "long_factor": [2.0] * turned}
    hf = {"max_position_embeddings": 16384, "rope_parameters": {"rope_theta": 10000.0} | scaling}
    config = LlamaConfig(hidden_size=head_dim, num_attention_heads=1, **hf)
    length = 5000 if long else None
    expected, magnitude = ROPE_INIT_FUNCTIONS[kind](config, seq_len=length)
    rope = Rope.from_hf(hf)
    np.testing.assert_allclose(rope.frequencies(head_dim, long=long), expected.numpy(), rtol=2e-6)
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-6)
    assert Rope.from_hf({"max_position_embeddings": 16384} | rope.to_hf()) == rope


def test_a_proportional_rotation_turns_the_first_dimensions_of_each_half():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 16))
    part = turned(x, jnp.arange(5)[None], Rope(kind="proportional", partial_rotary_factor=0.25))
    whole = turned(x, jnp.arange(5)[None])
    for first in (0, 8):
        np.testing.assert_array_equal(part[..., first : first + 2], whole[..., first : first + 2])
        np.testing.assert_array_equal(part[..., first + 2 : first + 8], x[..., first + 2 : first + 8])


def test_a_partial_rotation_leaves_the_rest_of_the_head():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 16))
    half = turned(x, jnp.arange(5)[None], Rope(partial_rotary_factor=0.5))
    np.testing.assert_array_equal(half[..., 8:], x[..., 8:])
    np.testing.assert_allclose(half[..., :8], turned(x[..., :8], jnp.arange(5)[None]), rtol=1e-6)


def test_llama3_scaling_keeps_short_waves_and_slows_long_ones():
    plain, scaled = Rope(theta=5e5).frequencies(128), LLAMA3.frequencies(128)
    wavelength = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8, rtol=1e-6)
    assert (np.diff(scaled) < 0).all()


def turned(x, positions, rope=KINDS[0]):
    return rotate(x, rotation(rope, x.shape[-1], positions))


def test_scores_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 16))
    score = lambda a, b: float(jnp.sum(turned(q, jnp.array([[a]])) * turned(k, jnp.array([[b]]))))  # noqa: E731
    assert score(7, 3) == pytest.approx(score(107, 103), abs=1e-4)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


def test_a_rotation_keeps_lengths_types_and_position_zero():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 16))
    out = turned(x, jnp.arange(5)[None])
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    assert turned(x.astype(jnp.bfloat16), jnp.arange(5)[None]).dtype == jnp.bfloat16


def test_neighbouring_positions_stay_apart_far_out():
    cos = rotation(KINDS[0], 64, jnp.array([[100_000, 100_001]])).cos_BSF
    assert float(jnp.abs(cos[0, 0] - cos[0, 1]).max()) > 0.1


def test_queries_grow_with_their_position_and_keys_do_not():
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.ministral3.modeling_ministral3")
    rope = Rope(kind="yarn", factor=4.0, original_max_position_embeddings=8, llama_4_scaling_beta=0.4)
    positions = np.array([[0, 7, 8, 15, 16, 1000]])
    expected = modeling.get_llama_4_attn_scale(torch.tensor(positions), 0.4, 8).numpy()[:, 0, :, 0]
    turned = rotation(rope, 8, jnp.asarray(positions))
    np.testing.assert_allclose(turned.queries_BS, expected, rtol=1e-6)
    assert expected[0, 1] == 1.0 and expected[0, 2] > 1.2
    plain = rotation(dataclasses.replace(rope, llama_4_scaling_beta=None), 8, jnp.asarray(positions))
    assert plain.queries_BS is None
    np.testing.assert_array_equal(turned.cos_BSF, plain.cos_BSF)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("part", [1.0, 0.75, 0.25])
def test_the_product_for_tpus_is_the_same_rotation(part, pairs):
    rope = Rope(theta=100.0, partial_rotary_factor=part)
    x, weight = (jax.random.normal(jax.random.key(seed), (2, 9, 3, 16)) for seed in (0, 1))
    turns = rotation(rope, 16, jnp.arange(18).reshape(2, 9) * 7)

    def by_product(x):
        return turning.turned(x, turns.cos_BSF, turns.sin_BSF, pairs=pairs)

    with jax.default_matmul_precision("highest"):
        for form in (lambda f: f, lambda f: jax.grad(lambda x: jnp.sum(f(x) * weight))):
            np.testing.assert_allclose(
                form(by_product)(x), form(lambda x: rotate(x, turns, pairs=pairs))(x), rtol=0, atol=1e-6
            )
    # What it multiplies with is exact in bfloat16, so that both forms round once.
    half = x.astype(jnp.bfloat16)
    np.testing.assert_array_equal(by_product(half), rotate(half, turns, pairs=pairs))


def test_only_tpus_rotate_by_a_product():
    turns = rotation(Rope(), 16, jnp.arange(9)[None])
    kinds = (AxisType.Auto,) * len(AXES)

    def products(platform, dtype):
        device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
        mesh = AbstractMesh((1,) * len(AXES), AXES, kinds, abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return str(jax.make_jaxpr(lambda x: rotate(x, turns))(jnp.zeros((1, 9, 3, 16), dtype))).count("dot_general")

    assert products("tpu", jnp.bfloat16) == 1
    assert products("cpu", jnp.bfloat16) == products("gpu", jnp.bfloat16) == products("tpu", jnp.float32) == 0
