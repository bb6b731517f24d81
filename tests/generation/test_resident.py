"""The resident engine: every request is answered as it would be alone, whatever else comes, goes and is loaded."""

import dataclasses
import gc
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import monitoring
from safetensors.numpy import load_file, save_file

from jaxft.adapters.attach import adapters, attach
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.adapters.make import attach_adapter
from jaxft.adapters.saved import train_whole
from jaxft.checkpoint import peft
from jaxft.config import AdapterConfig
from jaxft.errors import CheckpointError, ConfigError, DataError, ModelError
from jaxft.generation import steps
from jaxft.generation.request import Request
from jaxft.generation.settings import Sampling
from jaxft.generation.tokens import generate_tokens
from jaxft.resident import memory_bytes, resident_engine

GREEDY = Sampling(max_new_tokens=12)
DRAWN = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.95, seed=5)
SIZES = {"slots": 4, "length": 40, "adapters": 2, "max_rank": 6}


def tuned(model, seed, **settings):
    copy = nnx.merge(*nnx.split(model))
    attach(copy, ["all-linear"], lora_factory(LoRASettings(**{"r": 4, "alpha": 8.0} | settings)), jax.random.key(seed))
    for number, lora in enumerate(adapters(copy).values()):
        shape, draw = lora.lora_b.get_value().shape, np.random.default_rng((seed, number))
        lora.lora_b.set_value(jnp.asarray(0.1 * draw.standard_normal(shape, np.float32)))
    return copy


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):
    """PEFT folders of two adapters."""
    names = [str(tmp_path_factory.mktemp(f"adapter{seed}")) for seed in (1, 2)]
    for seed, name in enumerate(names, 1):
        peft.write_adapter(tuned(model, seed), name, base="tiny")
    return names


@pytest.fixture(scope="module")
def expected(model, prompts):
    """Greedy answers of the base and of each adapter, alone in the model."""
    models = [model, tuned(model, 1), tuned(model, 2)]
    return [generate_tokens(one, prompts, sampling=GREEDY, slots=4, length=40) for one in models]


@pytest.fixture(scope="module")
def shared_engine(model, folders):
    engine = resident_engine(model, stop_ids=(), **SIZES)
    engine.compile(16)
    engine.write_adapter(1, folders[0])
    engine.write_adapter(2, folders[1])
    return engine


@pytest.fixture
def engine(shared_engine):
    yield shared_engine
    while shared_engine.step():
        pass
    assert not shared_engine.num_waiting and not shared_engine.num_running


def request(number, prompt, sampling=GREEDY, **fields):
    return Request(id=number, prompt=tuple(prompt), sampling=sampling, **fields)


def answered(engine, *requests):
    for one in requests:
        engine.submit(one)
    while engine.step():
        pass
    return requests


def everyone(prompts, sampling=GREEDY, **fields):
    """Every prompt to the base and to both adapters, in turn."""
    return [
        request(3 * number + adapter, prompt, sampling, adapter=adapter, **fields)
        for number, prompt in enumerate(prompts)
        for adapter in range(3)
    ]


def check(requests, expected):
    for one in requests:
        alone = expected[one.adapter][one.id // 3]
        assert tuple(one.tokens) == alone.tokens and one.finish_reason == "length"
        np.testing.assert_allclose(one.logprobs, alone.logprobs, rtol=0, atol=1e-4)


def test_base_and_adapters_in_one_batch_each_answer_as_alone(engine, prompts, expected):
    assert len({answers[0].tokens for answers in expected}) == 3
    check(answered(engine, *everyone(prompts)), expected)


def test_a_seed_gives_the_same_tokens_alone_and_among_others(engine, prompts):
    def drawn():
        return [request(90 + stream, prompts[3], DRAWN, stream=stream, adapter=1) for stream in range(2)]

    alone = [answered(engine, one)[0].tokens for one in drawn()]
    assert alone[0] != alone[1]
    others = everyone(prompts[4:9], dataclasses.replace(DRAWN, seed=9, max_new_tokens=9))
    others[1].alternatives = 5
    among = answered(engine, *others[:4], drawn()[0], *others[4:9], drawn()[1], *others[9:])
    assert [among[4].tokens, among[10].tokens] == alone
    reordered = answered(engine, *reversed(drawn()))
    assert [one.tokens for one in reversed(reordered)] == alone


def test_cancelled_requests_leave_their_slot_within_a_step_or_the_queue(engine, prompts, expected):
    ended = []
    requests = everyone(prompts[:3])
    for one in requests:
        one.on_end = lambda one: ended.append(one.id)
        one.on_token = lambda *_: None  # few steps a dispatch
        engine.submit(one)
    while engine.num_running < 4 or not all(one.tokens[1:] for one in requests[:4]):
        assert engine.step()
    threads = [threading.Thread(target=engine.cancel, args=(number,)) for number in (1, 7, 1, 999)]
    for thread in threads:
        thread.start()
        thread.join()
    engine.step()
    assert ended[:2] == [1, 7] and engine.num_waiting == 3 and requests[4].tokens
    while engine.step():
        pass
    assert sorted(ended) == list(range(9))
    assert [one.id for one in requests if one.cancelled] == [1, 7]
    assert requests[1].finish_reason is None and 2 <= len(requests[1].tokens) < 12 and not requests[7].tokens
    check([one for one in requests if not one.cancelled], expected)


def test_a_request_cancelled_while_its_prompt_is_computed_is_not_decoded(engine, prompts, expected, monkeypatch):
    compute, ended = steps.prefill, []
    gone, other = request(0, prompts[0], on_end=ended.append), request(3, prompts[1])

    def cancelled_meanwhile(*args, **options):
        results = compute(*args, **options)
        thread = threading.Thread(target=engine.cancel, args=(gone.id,))
        thread.start()
        thread.join()
        return results

    engine.submit(gone)
    with monkeypatch.context() as patched:
        patched.setattr(steps, "prefill", cancelled_meanwhile)
        assert engine.step() and engine.num_running == 1 and not ended
    engine.submit(other)
    engine.step()  # computes the other prompt, in the place that is free
    assert ended == [gone] and gone.cancelled and len(gone.tokens) == 1
    assert [one for one in engine.slots if one is not None] == [other]
    while engine.step():
        pass
    check([other], expected)


def test_callbacks_see_every_token_in_order_and_can_end_an_answer(engine, prompts, expected):
    seen, ended = [], []

    def on_token(token, logprob, top):
        seen.append((token, logprob, top))
        return len(seen) == 6

    ending = request(0, prompts[2], on_token=on_token, on_end=ended.append)
    other = request(3 * 2 + 2, prompts[2], adapter=2)
    answered(engine, ending, other)
    assert seen == [*zip(ending.tokens, ending.logprobs, [()] * 6, strict=True)]
    assert tuple(ending.tokens) == expected[0][2].tokens[:6] and ending.finish_reason == "stop"
    assert ended == [ending]
    check([other], expected)


def test_the_first_to_come_is_the_first_to_start(engine, prompts):
    started = []
    requests = [request(i, prompt, on_token=lambda *_, i=i: started.append(i)) for i, prompt in enumerate(prompts)]
    answered(engine, *requests)
    assert list(dict.fromkeys(started)) == list(range(len(prompts)))


def test_alternatives_are_the_likeliest_of_a_full_pass(engine, model, prompts, logprobs_of):
    seen = []
    asking = request(1, prompts[0], DRAWN, alternatives=3, on_token=lambda *token: seen.append(token[2]))
    plain = request(2, prompts[0], DRAWN)
    answered(engine, asking, plain)
    assert asking.tokens == plain.tokens and asking.top == seen and not plain.top
    full = logprobs_of(model, prompts[0] + asking.tokens)[len(prompts[0]) - 1 :]
    for row, token, logprob, top in zip(full, asking.tokens, asking.logprobs, asking.top, strict=False):
        assert [one for one, _ in top] == np.argsort(-row)[:3].tolist()
        np.testing.assert_allclose([value for _, value in top], np.sort(row)[:-4:-1], rtol=0, atol=1e-4)
        assert token not in dict(top) or dict(top)[token] == logprob


def test_a_number_that_is_written_again_gives_the_new_adapter(model, engine, folders, prompts, expected):
    before = request(1, prompts[0], adapter=1)
    engine.submit(before)
    with pytest.raises(ModelError, match="adapter 1 is used by 1 requests: wait until they end, or cancel them"):
        engine.write_adapter(1, folders[1])
    with pytest.raises(ModelError, match="adapter 1 is used by 1 requests"):
        engine.clear_adapter(1)
    check(answered(engine), expected)
    engine.write_adapter(1, folders[1])
    (after,) = answered(engine, request(2, prompts[0], adapter=1))
    assert tuple(before.tokens) == expected[1][0].tokens and tuple(after.tokens) == expected[2][0].tokens
    engine.clear_adapter(1)
    with pytest.raises(ModelError, match="request 3 asks for adapter 1, which is not loaded"):
        engine.submit(request(3, prompts[0], adapter=1))
    engine.write_adapter(1, folders[0])
    check(answered(engine, request(1, prompts[0], adapter=1), request(2, prompts[0], adapter=2)), expected)


def test_many_requests_keep_no_array_and_compile_nothing(engine, folders, prompts):
    engine.write_adapter(2, folders[1])
    gc.collect()  # of what other tests left
    arrays, compiled = len(jax.live_arrays()), []
    monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    try:
        for _ in range(3):
            answered(engine, *everyone(prompts, DRAWN))
        engine.write_adapter(2, folders[1])
    finally:
        monitoring.clear_event_listeners()
    assert not compiled and len(jax.live_arrays()) == arrays


def test_memory_is_known_before_it_is_taken(model, engine):
    planned = memory_bytes(nnx.eval_shape(lambda: model), **SIZES)
    assert planned.cache == sum(leaf.nbytes for leaf in jax.tree.leaves(engine.memory))
    extra = sum(leaf.nbytes for leaf in jax.tree.leaves(engine.params)) - sum(
        leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))
    )
    assert planned.adapters == extra > 0
    assert memory_bytes(model, **SIZES | {"adapters": 0}).adapters == 0


def test_without_room_for_adapters_the_model_may_have_its_own(model, prompts, expected):
    engine = resident_engine(tuned(model, 2), stop_ids=expected[2][0].tokens[3:4], **SIZES | {"adapters": 0})
    (one,) = answered(engine, request(1, prompts[0]))
    assert tuple(one.tokens) == expected[2][0].tokens[:4] and one.finish_reason == "stop"
    with pytest.raises(ModelError, match="there is no adapter 1: this engine has numbers 1 to 0"):
        engine.write_adapter(1, "nowhere")


def changed(folder, to, change=lambda tensors: tensors, **config):
    """A copy of an adapter's folder with other tensors and settings."""
    save_file(change(load_file(f"{folder}/adapter_model.safetensors")), to / "adapter_model.safetensors")
    with open(f"{folder}/adapter_config.json", encoding="utf-8") as file:
        (to / "adapter_config.json").write_text(json.dumps(json.load(file) | config))
    return str(to)


def test_adapters_that_do_not_fit_are_refused_and_leave_the_others(model, engine, folders, prompts, expected, tmp_path):
    strange = changed(folders[0], tmp_path, lambda tensors: {f"other.{name}": one for name, one in tensors.items()})
    with pytest.raises(CheckpointError):
        engine.write_adapter(1, strange)
    with pytest.raises(ModelError, match="there is no adapter 3: this engine has numbers 1 to 2"):
        engine.write_adapter(3, folders[0])
    with pytest.raises(ModelError, match="there is no adapter 0"):
        engine.write_adapter(0, folders[0])
    check(answered(engine, request(1, prompts[0], adapter=1)), expected)


@pytest.mark.parametrize(
    ("kind", "settings", "whole"),
    [
        ("one with modules of the base", {"kind": "lora", "r": 2}, ("norm",)),
        ("VeRA on", {"kind": "vera", "r": 2}, ()),
        ("DoRA on", {"kind": "lora", "r": 2, "use_dora": True}, ()),
        ("virtual tokens", {"kind": "prompt", "num_virtual_tokens": 2}, ()),
    ],
)
def test_folders_of_other_kinds_are_refused_by_name(model, engine, tmp_path, kind, settings, whole):
    other = nnx.merge(*nnx.split(model))
    attach_adapter(other, AdapterConfig(**settings), 0)
    train_whole(other, whole)
    peft.write_adapter(other, str(tmp_path), base="tiny")
    with pytest.raises(ModelError, match=f"the adapter is {kind}.*plain LoRA on linear layers. Serve it alone"):
        engine.write_adapter(1, str(tmp_path))


def test_requests_that_do_not_fit_are_refused(engine):
    for prompt, sampling, message in (
        ((), GREEDY, "the prompt is empty"),
        ((1, 260), GREEDY, r"ids outside 0\.\.259"),
        ((1,) * 29, GREEDY, "29 tokens and its answer may have 12: 41 together, and there is room for 40"),
    ):
        with pytest.raises(DataError, match=message):
            engine.submit(request(1, prompt, sampling))
    with pytest.raises(ConfigError, match="alternatives=21 must be 0 to 20"):
        engine.submit(request(1, (1,), alternatives=21))


def test_sizes_that_do_not_fit_are_refused(model):
    for sizes, message in (
        ({"slots": 0}, "slots=0 must be at least 1"),
        ({"length": 257}, "length=257 must be 2 to 256"),
        ({"max_rank": 0}, "room for 2 adapters of rank 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            resident_engine(model, stop_ids=(), **SIZES | sizes)
    with pytest.raises(ModelError, match="the model has an adapter already"):
        resident_engine(tuned(model, 1), stop_ids=(), **SIZES)
