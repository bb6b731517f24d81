"""The DPO loss against TRL on a tiny Llama, and its properties: ln 2 at the start, packing, pairs and not tokens."""

import contextlib
import functools
import math
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import load_model
from jaxft.data.batch import Example, assemble
from jaxft.objectives.documents import document_logps
from jaxft.objectives.dpo import dpo_loss, dpo_terms
from jaxft.objectives.pairs import Pairs

PAIRS = 3


def pairs(count=PAIRS, longest=14):
    """(chosen, rejected) documents that share a prompt."""
    rng = np.random.default_rng(1)
    out = []
    for row in range(count):
        prompt = rng.integers(0, 96, 3 + row)
        documents = []
        for length in rng.integers(2, longest - len(prompt), 2):
            tokens = np.concatenate([prompt, rng.integers(0, 96, length)]).astype(np.int32)
            mask = (np.arange(len(tokens)) >= len(prompt)).astype(np.uint8)
            documents.append(Example(tokens=tokens, mask=mask, row=row))
        out.append(tuple(documents))
    return out


def batch_of(rows, length=32):
    return jax.tree.map(jnp.asarray, assemble([[d for pair in row for d in pair] for row in rows], length))


@pytest.fixture(scope="module")
def models(tiny_llama):
    """(policy, reference): two models of one shape whose weights differ by a few per cent."""
    reference = load_model(tiny_llama("tied")).module
    policy = nnx.merge(*nnx.split(reference))
    state = nnx.state(policy)
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    moved = [x + 0.05 * jnp.std(x) * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    nnx.update(policy, jax.tree.unflatten(treedef, moved))
    return policy, reference


def value_and_grad(policy, reference, batch, **settings):
    graphdef, state = nnx.split(policy)

    def total(state):
        frozen = document_logps(reference, batch)
        sums = dpo_loss(nnx.merge(graphdef, state), frozen, batch, None, **settings)
        return sums.total / sums.weight, sums

    (loss, sums), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(state)
    return float(loss), sums, grads


def by_trl(policy, reference, rows, **settings):
    """(loss, metrics, gradients by name) of TRL's DPOTrainer, called with the fields of a trainer that it reads."""
    torch = pytest.importorskip("torch")
    trl_dpo = pytest.importorskip("trl.trainer.dpo_trainer")
    fuse = pytest.importorskip("trl.trainer.utils").add_fused_lm_head
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
    for model in (policy, reference):
        fuse(model, temperature=1.0, outputs=outputs)
    documents = [pair[side] for side in (0, 1) for pair in rows]
    longest = max(map(len, documents))
    ids, mask, completion = (torch.zeros(len(documents), longest, dtype=torch.long) for _ in range(3))
    for row, document in enumerate(documents):
        ids[row, : len(document)] = torch.tensor(document.tokens)
        mask[row, : len(document)] = 1
        completion[row, : len(document)] = torch.tensor(document.mask)
    same = lambda x: x  # noqa: E731
    trainer = SimpleNamespace(
        model=policy, ref_model=reference, ld_alpha=None, aux_loss_enabled=False, precompute_ref_logps=False,
        f_divergence_type="reverse_kl", loss_types=["sigmoid"], loss_weights=[1.0], beta=0.1, label_smoothing=0.0,
        use_weighting=False, _metrics={"train": defaultdict(list), "eval": defaultdict(list)},
        _total_train_tokens=0, _tp_size=1,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, gradient_checkpointing=False),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same,
            autocast=contextlib.nullcontext,
        ),
    )  # fmt: skip
    vars(trainer).update(settings)
    policy.train()
    inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
    loss = trl_dpo.DPOTrainer._compute_loss(trainer, policy, inputs, False)
    policy.zero_grad()
    loss.backward()
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    return float(loss.detach()), metrics, {name: p.grad.numpy() for name, p in policy.named_parameters()}


def torch_of(module, folder, torch_llama):
    """The transformers model of the tied folder with the weights of one of ours."""
    torch = pytest.importorskip("torch")
    model = torch_llama(folder)
    tensors = {name: torch.tensor(np.asarray(make())) for name, (_, make) in hf_tensors(module).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_gradients_and_metrics_are_those_of_trl(models, tiny_llama, torch_llama, beta):
    policy, reference = models
    theirs = [torch_of(one, tiny_llama("tied"), torch_llama) for one in models]
    expected, metrics, expected_grads = by_trl(*theirs, pairs(), beta=beta)
    loss, sums, grads = value_and_grad(policy, reference, batch_of([[pair] for pair in pairs()]), beta=beta)
    assert loss == pytest.approx(expected, rel=1e-5)
    means = {name: float(value) for name, value in sums.means().items()}
    assert set(means) - {"loss"} <= set(metrics)
    for name in set(means) - {"loss"}:
        assert means[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-5), name
    moved = nnx.merge(nnx.split(policy)[0], grads)
    for name, (_, make) in hf_tensors(moved).items():
        scale = np.abs(expected_grads[name]).max()
        np.testing.assert_allclose(make(), expected_grads[name], rtol=0, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_label_smoothing_is_trl_s_formula(models, tiny_llama, torch_llama, smoothing):
    """TRL's `aot` sorts log-ratios over a batch; of a single pair it is the smoothed sigmoid loss."""
    policy, reference = models
    for pair in pairs():
        theirs = [torch_of(one, tiny_llama("tied"), torch_llama) for one in models]
        expected, _, _ = by_trl(*theirs, [pair], beta=0.5, label_smoothing=smoothing, loss_types=["aot"])
        loss, _, _ = value_and_grad(policy, reference, batch_of([[pair]]), beta=0.5, label_smoothing=smoothing)
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_policy_that_is_its_reference_has_ln_2(models):
    """The passes with and without gradients are compiled apart, so the last bits of log-probabilities may differ."""
    _, reference = models
    loss, sums, _ = value_and_grad(reference, reference, batch_of([pairs()], 64), beta=0.3)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(float(sums.metrics[name].total)) < 1e-5


def test_packed_pairs_equal_pairs_alone(models):
    policy, reference = models
    alone = value_and_grad(policy, reference, batch_of([[pair] for pair in pairs()]), beta=0.4)
    packed = value_and_grad(policy, reference, batch_of([pairs(), []], 64), beta=0.4)
    assert packed[0] == pytest.approx(alone[0], rel=1e-6)
    assert float(packed[1].weight) == PAIRS
    for a, b in zip(jax.tree.leaves(packed[2]), jax.tree.leaves(alone[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))


def test_the_terms_by_hand():
    policy = Pairs(jnp.array([[-1.0, -5.0]]), jnp.array([[-3.0, -2.0]]))
    reference = Pairs(jnp.array([[-2.0, -4.0]]), jnp.array([[-2.0, -4.0]]))
    margins = np.array([[2.0, -3.0]])
    terms = functools.partial(dpo_terms, policy, reference, beta=0.5)
    sigmoid = 1 / (1 + np.exp(-0.5 * margins))
    np.testing.assert_allclose(terms(label_smoothing=0.0), -np.log(sigmoid), rtol=1e-6)
    smoothed = -0.8 * np.log(sigmoid) - 0.2 * np.log(1 - sigmoid)
    np.testing.assert_allclose(terms(label_smoothing=0.2), smoothed, rtol=1e-6)
