"""Processes of one run must agree on all that changes its numbers; whatever differs is named, with who has it."""

import json
import os

import jax
import pytest

from jaxft.assets import ASSETS
from jaxft.config import RunConfig
from jaxft.config.fields import field_values
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import ConfigError
from jaxft.runs.identity import agreement
from jaxft.runs.train import set_up


def as_told(shared):
    """What another process receives: it went through JSON."""
    return json.loads(json.dumps(shared))


def other(shared, name, value="another"):
    return as_told(shared) | {name: [value, value]}


def test_every_setting_must_be_equal_but_how_rows_are_read_and_what_is_compared_by_content():
    own = agreement.settings_of(RunConfig())
    fields = [field for field, _ in field_values(RunConfig()) if not field.sections]
    free = {field.key for field in fields if field.key not in own}
    assert free == {field.key for field in fields if field.by_content} | {"data.num_proc", "data.cache"}
    for name in ("seed", "optim.learning_rate", "train.steps", "train.epochs", "checkpoint.every", "output_dir"):
        (line,) = agreement.differences([own, other(own, name)])
        assert line == f"{name}: {own[name][1]} in process 0, another in process 1"
    assert agreement.differences([own, as_told(own), as_told(own)]) == []


def test_the_processes_that_differ_are_named():
    own = agreement.settings_of(RunConfig())
    (line,) = agreement.differences([own, own, other(own, "seed", "7"), own, other(own, "seed", "8")])
    assert line == "seed: 0 in processes 0, 1, 3, 7 in process 2, 8 in process 4"
    (line,) = agreement.differences([{}, {"libtpu": ["1", "1"]}])
    assert line == "libtpu: (absent) in process 0, 1 in process 1"
    many = agreement.differences([{}, {str(number): ["1", "x" * 999] for number in range(50)}])
    assert len(many) == agreement.SHOWN + 1 and many[-1] == "... and 38 more" and max(map(len, many)) < 300


def test_all_processes_refuse_what_differs(monkeypatch):
    own = agreement.settings_of(RunConfig())
    for every in ([own, other(own, "seed", "7")], [other(own, "seed", "7"), own]):  # whichever of them this one is
        monkeypatch.setattr(agreement, "gather", lambda _, every=every: every)
        with pytest.raises(ConfigError, match=r"since they differ in\n  seed: .*7 in process.*\nGive every process"):
            agreement.check_same(own, "Give every process the same.")
    monkeypatch.setattr(agreement, "gather", lambda value: [value, as_told(value)])
    agreement.check_same(own, "Give every process the same.")


def test_it_is_compared_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(agreement, "is_multi_process", lambda: True)
    monkeypatch.setattr(agreement, "gather", lambda value: [value, other(value, "optim.learning_rate", "0.5")])
    with pytest.raises(ConfigError, match=r"optim\.learning_rate: 0\.0002 in process 0, 0\.5 in process 1"):
        set_up(RunConfig())  # it names neither a model nor rows


def test_rows_weights_and_template_are_compared_by_content(monkeypatch):
    reads = {
        "data.train": {"path": "rows.jsonl", "digest": "a" * 64, "examples": 1200, "tokens": 34567},
        "model.path": {"path": "m", "digest": "t"},
    }
    tokenizer = load_tokenizer(ASSETS / "smoke")
    own = agreement.contents_of(reads, tokenizer)
    assert set(own) == {*reads, "the chat template"}
    moved = agreement.contents_of({**reads, "model.path": {"path": "elsewhere", "digest": "t"}}, tokenizer)
    assert agreement.differences([own, moved]) == []
    monkeypatch.setattr(agreement, "is_multi_process", lambda: True)
    for name in own:
        monkeypatch.setattr(agreement, "gather", lambda value, name=name: [value, other(value, name)])
        with pytest.raises(ConfigError, match=rf"\n  {name}: .* in process 0, another in process 1\nGive every host"):
            agreement.check_contents(reads, tokenizer)
    assert own["data.train"][1] == "rows.jsonl (digest aaaaaaaaaaaa, 1,200 examples of 34,567 tokens)"


def test_the_programs_are_compared():
    own = agreement.versions()
    assert own["jax (package)"][0] == jax.__version__ and own["Python"][0].count(".") == 1
    assert {"jaxlib (package)", "numpy (package)", "orbax-checkpoint (package)", "libtpu (package)"} <= set(own)
    assert "program" in own["jaxft"][0]


def test_flags_that_change_numbers_are_compared_and_those_of_one_process_not(monkeypatch):
    own = agreement.switches()
    for name, value in (
        ("jax_default_matmul_precision", "float32"), ("jax_enable_x64", True), ("jax_threefry_partitionable", False),
        ("jax_numpy_dtype_promotion", "strict"), ("jax_default_prng_impl", "rbg"), ("jax_debug_nans", True),
        ("jax_disable_most_optimizations", not jax.config.values["jax_disable_most_optimizations"]),
    ):  # fmt: skip
        before = jax.config.values[name]
        try:
            jax.config.update(name, value)
            assert [line.partition(":")[0] for line in agreement.differences([own, agreement.switches()])] == [name]
        finally:
            jax.config.update(name, before)
    of_one_process = {"jax_compilation_cache_dir", "jax_cuda_visible_devices", "jax_log_compiles", "jax_dump_ir_to"}
    assert not of_one_process & set(own)
    for name in ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE"):
        monkeypatch.setenv(name, "1")
        assert agreement.differences([own, agreement.switches()]) == [f"${name}: None in process 0, '1' in process 1"]
        monkeypatch.delenv(name)
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_force_host_platform_device_count=3 --xla_dump_to=/tmp/x")
    assert agreement.differences([own, agreement.switches()]) == []
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_allow_excess_precision=false")
    assert len(agreement.differences([own, agreement.switches()])) == 1


def test_flags_of_xla_may_be_in_a_file(tmp_path):
    (tmp_path / "flags").write_text("--xla_a=1\n--xla_dump_to=x --xla_b='2 3'\n")
    assert agreement.xla_flags(str(tmp_path / "flags")) == ["--xla_a=1", "--xla_b=2 3"]
    assert agreement.xla_flags("--xla_a='1") == ["--xla_a='1"] and agreement.xla_flags("") == []
