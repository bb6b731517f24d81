"""8-bit moments: bitsandbytes' map, codes, scales and steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.optim.eight_bit import block_length, dequantize_blocks, quantize_blocks, scale_by_adam_8bit, uses_8_bits
from jaxft.quant.dynamic import decode, encode

RATE, B1, B2, EPS = 1e-2, 0.9, 0.99, 1e-8
STEPS = 5


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_bitsandbytes(signed):
    functional = pytest.importorskip("bitsandbytes.functional")
    table = functional.create_dynamic_map(signed=signed).numpy()
    np.testing.assert_allclose(decode(jnp.arange(256), signed=signed), table, rtol=2e-7, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_a_code_is_the_nearest(signed):
    table = np.asarray(decode(jnp.arange(256), signed=signed))
    rng = np.random.default_rng(0)
    x = np.float32(rng.normal(size=20_000) * np.exp(4 * rng.normal(size=20_000))).clip(-1, 1)
    x = np.concatenate([x if signed else np.abs(x), table])
    codes = np.asarray(encode(jnp.asarray(x), signed=signed))
    np.testing.assert_array_equal(codes, np.abs(x[:, None] - table).argmin(1))
    assert codes.dtype == np.uint8 and set(codes) >= set(range(256))


@pytest.mark.parametrize(
    ("length", "block"), [(4096, 256), (256, 256), (5120, 256), (576, 192), (64, 64), (29568, 231)]
)
def test_blocks_divide_their_axis(length, block):
    assert block_length(length) == block


def test_an_axis_of_few_divisors_is_one_block():
    assert block_length(509) == 509
    assert block_length(2 * 509) == 1018


@pytest.mark.parametrize("axis", [-1, -2])
def test_what_comes_back_is_near_and_zeros_stay(axis):
    x = np.random.default_rng(0).normal(size=(2, 512, 768)).astype(np.float32)
    x[0, :256] = 0
    codes, absmax = quantize_blocks(jnp.asarray(x), axis, signed=True)
    assert codes.shape == x.shape and absmax.shape == ((2, 512, 3) if axis == -1 else (2, 2, 768))
    back = np.asarray(dequantize_blocks(codes, absmax, axis, signed=True))
    # Half of the widest step of the map, 0.9 / 64, of a block's largest.
    assert np.abs(back - x).max() <= 0.9 / 64 / 2 * np.abs(x).max() + 1e-6
    assert not back[0, :256].any()


def test_what_stays_in_float32():
    kinds = {
        "layers/0/mlp/up_proj/kernel": ((2, 64, 64), True),
        "layers/0/mlp/down_proj/kernel": ((2, 64, 63), False),  # 4032 elements of a layer
        "layers/0/norm/scale": ((32, 4096), False),
        "embed_tokens/embedding": ((512, 512), False),
        "lm_head/kernel": ((512, 512), True),
        "layers/0/self_attn/q_proj/adapter/lora_a": ((2, 16, 256), True),
    }
    params = {path: jnp.zeros(shape) for path, (shape, _) in kinds.items()}
    state = scale_by_adam_8bit(b1=B1, b2=B2, eps=EPS).init(params)
    for path, (_, small) in kinds.items():
        assert uses_8_bits(path, params[path]) is small
        assert {state.mu[path].dtype, state.nu[path].dtype} == {jnp.dtype("uint8" if small else "float32")}
        assert (path in state.mu_scales) is (path in state.nu_scales) is small


def trained(path, start, grads):
    """(parameter after each step, state) of our optimizer with decay and a learning rate, as AdamW chains them."""
    adam = scale_by_adam_8bit(b1=B1, b2=B2, eps=EPS)
    tx = optax.chain(adam, optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(RATE))
    params, seen = {path: jnp.asarray(start)}, []
    state, update = tx.init(params), jax.jit(tx.update)
    for grad in grads:
        updates, state = update({path: jnp.asarray(grad)}, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params[path]))
    return seen, state[0]


def trained_by_bitsandbytes(start, grads):
    torch, bnb = pytest.importorskip("torch"), pytest.importorskip("bitsandbytes")
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = bnb.optim.AdamW8bit([parameter], lr=RATE, betas=(B1, B2), eps=EPS, weight_decay=0.1)
    seen = []
    for grad in grads:
        parameter.grad = torch.tensor(grad)
        optimizer.step()
        seen.append(parameter.detach().numpy().copy())
    return seen, optimizer.state[parameter]


def drawn(shape):
    rng = np.random.default_rng(0)
    start = rng.normal(size=shape).astype(np.float32)
    # Sizes from block to block and number to number that use every decade of the map.
    magnitudes = np.exp(3 * rng.normal(size=shape))
    return start, [np.float32(magnitudes * rng.normal(size=shape)) for _ in range(STEPS)]


@pytest.fixture
def exact(monkeypatch):
    """bitsandbytes' CPU kernel looks float32 up in steps of 2^-15; of other types it finds the nearest code itself."""
    ops = pytest.importorskip("bitsandbytes.backends.cpu.ops")
    torch = pytest.importorskip("torch")

    def quantize(x, code, absmax_out, out, blocksize):
        codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, blocksize)
        out.copy_(codes)
        absmax_out.copy_(absmax)

    monkeypatch.setattr(ops, "_quant_blockwise_fp32_direct", quantize)


@pytest.mark.parametrize("along", ["outputs", "inputs"])
def test_codes_scales_and_parameters_are_bitsandbytes(along, exact):
    start, grads = drawn((32, 512))
    flip = (lambda x: x) if along == "outputs" else np.transpose
    path = {"outputs": "layers/0/mlp/up_proj/kernel", "inputs": "layers/0/mlp/down_proj/kernel"}[along]
    theirs, state = trained_by_bitsandbytes(start, grads)
    # A stack of one layer; down_proj's kernel is the transpose of torch's weight, as in every checkpoint.
    ours, mine = trained(path, flip(start)[None], [flip(grad)[None] for grad in grads])
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # Where a second moment is rounded to 0, steps are thousands of learning rates long.
        np.testing.assert_allclose(flip(a[0]), b, rtol=1e-5, atol=2e-6, err_msg=str(step))
    for name, number in (("mu", 1), ("nu", 2)):
        codes = flip(np.asarray(getattr(mine, name)[path][0])).astype(int)
        # A moment on the border of two codes may fall to either: float32 is added up in another order.
        differs = codes != state[f"state{number}"].numpy().astype(int)
        assert differs.sum() <= 3, f"{differs.sum()} of {differs.size} codes of {name}"
        absmax = flip(np.asarray(getattr(mine, f"{name}_scales")[path]["absmax"][0]))
        np.testing.assert_allclose(absmax.reshape(-1), state[f"absmax{number}"].numpy(), rtol=1e-6)


def test_bitsandbytes_as_it_is_on_a_cpu_is_as_near_as_its_steps_are():
    start, grads = drawn((32, 512))
    path = "layers/0/mlp/up_proj/kernel"
    _, state = trained_by_bitsandbytes(start, grads[:1])
    _, mine = trained(path, start[None], [grads[0][None]])
    for name, number, signed in (("mu", 1, True), ("nu", 2, False)):
        ours, theirs = (
            np.asarray(decode(jnp.asarray(codes), signed=signed))
            for codes in (getattr(mine, name)[path][0], state[f"state{number}"].numpy())
        )
        # Both are within half a step of the map of one number, theirs after it was moved by up to 2^-15.
        assert np.abs(ours - theirs).max() <= 0.9 / 64 + 2**-15
        assert np.mean(np.abs(ours - theirs) > 2**-14) < 0.02


def test_small_parameters_are_plain_adam():
    path, (start, grads) = "layers/0/mlp/up_proj/kernel", drawn((8, 16))
    plain, state = optax.adam(1.0, B1, B2, EPS), None
    ours, _ = trained(path, start[None], [grad[None] for grad in grads])
    value = jnp.asarray(start)
    state = plain.init(value)
    for grad, seen in zip(grads, ours, strict=True):
        updates, state = plain.update(grad, state)
        value = value * (1 - RATE * 0.1) + RATE * updates
        np.testing.assert_allclose(seen[0], value, rtol=0, atol=2e-6)
