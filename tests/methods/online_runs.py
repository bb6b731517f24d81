"""Small runs of methods that learn from rewards, shared by their tests."""

import contextlib
import dataclasses
import math

import jax
from flax import nnx
from pair_runs import config_of, write_rows

from jaxft import api
from jaxft.methods import method_of
from jaxft.methods.method import Run
from jaxft.optim.make import make_schedule
from jaxft.runs.build import (
    abstract_model,
    build_model,
    load_frozen,
    make_mesh,
    make_step,
    make_tx,
    start_state,
    with_frozen,
)

PROMPTS = [{"prompt": f"Colour {n}?", "reference": f"{n % 3}"} for n in range(12)]
# The share of odd token ids: every model can raise it. `alike` has nothing to teach.
REWARDS = '''
def odd(completion_ids, **_):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]

def alike(completions):
    return [0.5] * len(completions)

def nothing(completions):
    return [None] * len(completions)

def some(prompts, completion_ids, reference):
    """Nothing for prompts that end in 1, and the same for all answers to those that end in 2."""
    own = [len(set(ids)) / len(ids) for ids in completion_ids]
    return [None if r == "1" else 1.0 if r == "2" else value for r, value in zip(reference, own)]
'''


def settings_of(folder, functions="odd", **overrides):
    """Overrides of `config_of`. folder: gets the file of the reward functions."""
    path = folder / "rewards.py"
    path.write_text(REWARDS)
    return {
        "rewards.functions": ",".join(f"{path}:{name}" for name in functions.split(",")), "rewards.workers": 1,
        "rollout.num_generations": 4, "rollout.max_completion_length": 12, "data.max_length": 64,
        "optim.learning_rate": 1e-2,
    } | overrides  # fmt: skip


def online_config(method, folder, output_dir, functions="odd", **overrides):
    """The config of a small run."""
    return config_of(method, write_rows(folder, PROMPTS), output_dir, **settings_of(folder, functions, **overrides))


@contextlib.contextmanager
def started(config, folder, base=None, sizes=None):
    """(run with its reward functions, graphdef, state, jitted step) at step 0. base: weights to start from."""
    method, tokenizer = method_of(config), api.load_tokenizer(config.model.path)
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **(sizes or {"fsdp": 1})))
    data, model = method.prepare(config, tokenizer), abstract_model(config)
    mesh = make_mesh(config, model, jax.devices()[: math.prod((sizes or {"fsdp": 1}).values())])
    module = nnx.merge(*nnx.split(base or build_model(config, random_base=folder / "base").module))
    schedule = make_schedule(config.optim, 6)
    tx = make_tx(config, module, schedule)
    graphdef, state = start_state(config, module, tx, mesh)
    state = with_frozen(state, load_frozen(config, mesh, module))
    source = method.source(config, data, tokenizer)
    with (
        method.rewards(config, data) as rewards,
        method.environments(config, data, tokenizer) as environments,
    ):
        run = Run(
            config=config, folder=folder, tokenizer=tokenizer, data=data, mesh=mesh, model=model, source=source,
            rewards=rewards, environments=environments,
        )  # fmt: skip
        yield run, graphdef, state, jax.jit(mesh.bind(make_step(config, model, graphdef, tx, schedule)))
