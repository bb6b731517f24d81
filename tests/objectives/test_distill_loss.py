"""Distillation losses against TRL's, as tests/oracles/record_distill.py recorded them, and packing of rows."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from jaxft.checkpoint.hf import hf_tensors
from jaxft.checkpoint.load import load_model
from jaxft.data.batch import Example, assemble
from jaxft.objectives.distill import as_teacher, distill_loss
from jaxft.objectives.token_divergence import Divergence, Student, divergence_sums, top_logps

RECORD = np.load(Path(__file__).parents[1] / "oracles" / "distill.npz")
RECORDED = ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "lm_head.weight")
BETAS, TEMPERATURES, TOP = (0.0, 0.1, 0.5, 0.9, 1.0), (1.0, 2.0), 5


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(student, teacher) with the recorded weights; the teacher is wider."""
    out = []
    for name in ("student", "teacher"):
        folder = tmp_path_factory.mktemp(name)
        config = json.loads(str(RECORD[f"{name}/config"]))
        (folder / "config.json").write_text(
            json.dumps(config | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
        )
        prefix, other = f"{name}/", f"{name}/config"
        tensors = {key.removeprefix(prefix): RECORD[key] for key in RECORD if key.startswith(prefix) and key != other}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        out.append(load_model(str(folder)).module)
    return out


@pytest.fixture(scope="module")
def documents():
    """The recorded rows, each a document; what follows its last trained token is left out, since nothing sees it."""
    out = []
    for row, (tokens, mask) in enumerate(zip(RECORD["tokens"], RECORD["mask"], strict=True)):
        end = np.flatnonzero(mask)[-1] + 1
        out.append(Example(tokens=tokens[:end].astype(np.int32), mask=mask[:end].astype(np.uint8), row=row))
    return out


def batch_of(rows, length=12):
    return jax.tree.map(jnp.asarray, assemble(rows, length))


@pytest.fixture(scope="module")
def parts(models, documents):
    """(batch, student, teacher, function from the gradient by hidden vectors to the gradients of all parameters)."""
    batch = batch_of([[document] for document in documents])
    graphdef, state = nnx.split(models[0])

    def hidden_of(state):
        model = nnx.merge(graphdef, state)
        return model(batch.tokens_BS, batch.positions_BS, batch.segments_BS)[0]

    pull = jax.jit(lambda gradient: jax.vjp(hidden_of, state)[1](gradient)[0])
    unembed, head, _ = models[0].split_unembed()
    student = Student(unembed, head, jax.jit(hidden_of)(state), batch.targets_BS, batch.weights_BS)
    return batch, student, as_teacher(models[1], batch)._replace(dimensions=None), pull


def with_gradients(student, teacher, divergence):
    """(mean loss, its gradients by head and hidden vectors)."""

    @jax.jit
    def run(head, hidden_BSD):
        def mean(head, hidden_BSD):
            one = student._replace(head=head, hidden_BSD=hidden_BSD)
            return divergence_sums(one, teacher, divergence, chunk=5).loss / jnp.sum(student.weights_BS)

        return jax.value_and_grad(mean, argnums=(0, 1))(head, hidden_BSD)

    return run(student.head, student.hidden_BSD)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("form", ["whole", "top"])
def test_loss_and_gradients_are_those_of_trl(models, parts, form, beta, temperature):
    _, student, teacher, pull = parts
    if form == "top":
        teacher = top_logps(teacher, student.weights_BS, TOP, temperature=temperature)
    loss, (head, hidden) = with_gradients(student, teacher, Divergence(beta=beta, temperature=temperature))
    recorded = f"{form}/{beta}/{temperature}"
    assert loss == pytest.approx(float(RECORD[f"{recorded}/loss"]), rel=2e-5)
    gradients = pull(hidden)
    gradients["lm_head"] = head
    tensors = hf_tensors(nnx.merge(nnx.split(models[0])[0], gradients))
    ours = np.concatenate([np.asarray(tensors[name][1]()).ravel() for name in RECORDED])
    expected = RECORD[f"{recorded}/gradients"]
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def losses(student, teacher, batch, **settings):
    graphdef, state = nnx.split(student)

    def total(state):
        model = nnx.merge(graphdef, state)
        sums = distill_loss(model, as_teacher(teacher, batch), batch, None, divergence=Divergence(**settings))
        return sums.total / sums.weight, sums

    (loss, sums), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(state)
    return float(loss), {name: float(value) for name, value in sums.means().items()}, grads


def test_packed_rows_equal_rows_alone(models, documents):
    alone = losses(*models, batch_of([[document] for document in documents]), beta=0.3, sft_weight=0.2)
    packed = losses(*models, batch_of([documents, []], 36), beta=0.3, sft_weight=0.2)
    assert packed[1] == pytest.approx(alone[1], rel=1e-6)
    for a, b in zip(jax.tree.leaves(packed[2]), jax.tree.leaves(alone[2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(b))))


def test_a_student_that_is_its_teacher_has_no_loss(models, documents):
    batch = batch_of([documents], 36)
    for beta in (0.0, 0.5, 1.0):
        loss, means, grads = losses(models[1], models[1], batch, beta=beta)
        assert abs(loss) < 1e-6 and means["teacher_agreement"] == 1
        assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(grads)) < 1e-5


def test_the_loss_is_a_weighted_mean_of_divergence_and_cross_entropy(models, documents):
    loss, means, _ = losses(*models, batch_of([documents], 36), beta=0.3, temperature=2.0, sft_weight=0.2)
    assert loss == pytest.approx(0.8 * means["divergence"] + 0.2 * means["nll"], rel=1e-6)
