"""Conversions: every pair of formats, adapters, interruptions, and what is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from jaxft import cli, models
from jaxft.adapters.attach import attach
from jaxft.adapters.lora import LoRASettings, lora_factory
from jaxft.assets import ASSETS
from jaxft.checkpoint import hf, manifest, peft
from jaxft.checkpoint.gguf import GGUFFile
from jaxft.checkpoint.load import load_model
from jaxft.checkpoint.tensors import SafetensorsFolder
from jaxft.conversion import convert as conversions
from jaxft.conversion import targets as convert_targets
from jaxft.conversion.convert import convert
from jaxft.data.tokenizers.load import load_tokenizer
from jaxft.errors import CheckpointError, ConfigError, ExportError, FolderInUseError, ModelError
from jaxft.files.locks.lock import lock
from jaxft.files.targets import SMALL_FILES
from jaxft.runs import export as exports

QUIET = Console(quiet=True)
TOKENS = np.arange(24).reshape(2, 12) + 3


def write_model(folder: Path, *, dtype: str = "float32", **changes) -> Path:
    """A random model of the smoke shape with its tokenizer."""
    config = json.loads((ASSETS / "smoke" / "config.json").read_text()) | {"vocab_size": 264} | changes
    folder.mkdir(parents=True)
    model = models.random_model(models.config_from_hf(config), dtype=dtype, param_dtype=dtype, seed=0)
    hf.write_weights(model, str(folder))
    hf.write_config(str(folder), config, dtype=dtype)
    load_tokenizer(ASSETS / "smoke").save(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"th": 259, "the": 260}
    tokenizer["model"]["merges"] = [["t", "h"], ["th", "e"]]  # llama.cpp wants some
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def write_adapter(folder: Path, base: Path, *, use_rslora: bool = False) -> Path:
    """A LoRA of rank 4 on every linear layer, both halves random."""
    model = load_model(str(base)).module
    settings = LoRASettings(r=4, alpha=8, use_rslora=use_rslora)

    def make(layer, key):
        lora = lora_factory(settings)(layer, key)
        lora.lora_b.set_value(0.1 * jax.random.normal(key, lora.lora_b.get_value().shape))
        return lora

    attach(model, ("all-linear",), make, jax.random.key(1))
    peft.write_adapter(model, str(folder), base=str(base))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "lora", model)


def tensors_of(path) -> dict[str, np.ndarray]:
    source = GGUFFile(path) if str(path).endswith(".gguf") else SafetensorsFolder(path)
    return {name: source.read(name) for name in source.specs()}


def assert_same(left: dict, right: dict) -> None:
    assert set(left) == set(right)
    for name, array in left.items():
        np.testing.assert_array_equal(array, right[name], err_msg=name)


def test_there_and_back_through_every_format_is_the_same_bits(model, tmp_path):
    steps = [(model, "a.gguf", None), ("a.gguf", "orbax", "orbax"), ("orbax", "b.gguf", None), ("b.gguf", "back", None)]
    for source, to, form in steps:
        done = convert(str(tmp_path / source), str(tmp_path / to), form=form, console=QUIET)
        assert done["checks"]["tensors"] == "bitwise"
    assert_same(tensors_of(tmp_path / "back"), tensors_of(model))
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "b.gguf", "back", "orbax"], "nothing else is left behind"
    text = "the naïve text, 漢字!"
    assert load_tokenizer(tmp_path / "back").encode(text) == load_tokenizer(model).encode(text)
    assert load_tokenizer(tmp_path / "back").chat_template == load_tokenizer(model).chat_template


def test_an_orbax_folder_loads_like_any_model_and_restores_with_orbax_alone(model, tmp_path):
    convert(str(model), str(tmp_path / "orbax"), form="orbax", console=QUIET)
    loaded = load_model(str(tmp_path / "orbax"))
    np.testing.assert_array_equal(loaded.logits(TOKENS), load_model(str(model)).logits(TOKENS))
    import orbax.checkpoint as ocp

    params = ocp.StandardCheckpointer().restore(tmp_path / "orbax" / "params")
    embedding = SafetensorsFolder(model).read("model.embed_tokens.weight")
    np.testing.assert_array_equal(params["embed_tokens"]["embedding"], embedding)
    # Damage whose checksums are right, in an array's values and in its description.
    array = tmp_path / "orbax" / "params" / "norm.scale"
    for file in (array / "0", array / ".zarray"):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        manifest.write(tmp_path / "orbax")
        with pytest.raises(CheckpointError, match=r"norm\.scale"):
            load_model(str(tmp_path / "orbax"))
        file.write_bytes(whole)


def test_license_tokenizer_model_and_every_end_token_go_along(model, adapter, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(model, source)
    names = [
        "LICENSE.txt",
        "USE_POLICY.md",
        "Notice",
        "tokenizer.model",
        "added_tokens.json",
        "special_tokens_map.json",
    ]
    for name in names:
        (source / name).write_text("{}" if name.endswith(".json") else name)
    for name in ("train.py", "licensed.bin", "pytorch_model.bin"):
        (source / name).write_text("stays behind")
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": [256, 257]}))
    shutil.copytree(adapter, tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(source)
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    convert(str(source), str(tmp_path / "plain"), console=QUIET)
    convert(str(tmp_path / "lora"), str(tmp_path / "merged"), console=QUIET)
    exports.export(str(tmp_path / "lora"), str(tmp_path / "exported"))
    for folder in ("plain", "merged", "exported"):
        there = set(os.listdir(tmp_path / folder))
        assert set(names) <= there and not there & {"train.py", "licensed.bin", "pytorch_model.bin"}
        assert (tmp_path / folder / "Notice").read_text() == "Notice"
        ends = json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"]
        assert {256, 257} <= set(ends)
        card = (tmp_path / folder / "README.md").read_text()
        assert "library_name: transformers" in card and str(tmp_path) not in card


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_an_export_has_the_type_of_its_source(tmp_path, stored):
    source = write_model(tmp_path / "source", dtype="float32")
    convert(str(source), str(tmp_path / "stored"), dtype=stored, console=QUIET)
    exports.export(str(tmp_path / "stored"), str(tmp_path / "exported"))
    written = SafetensorsFolder(tmp_path / "exported")
    assert {str(spec.dtype) for spec in written.specs().values()} == {stored}
    assert_same(tensors_of(tmp_path / "exported"), tensors_of(tmp_path / "stored"))
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["torch_dtype"] == stored
    exports.export(str(tmp_path / "stored"), str(tmp_path / "wide"), dtype="float32")
    assert {str(spec.dtype) for spec in SafetensorsFolder(tmp_path / "wide").specs().values()} == {"float32"}


def test_experts_go_through_orbax_and_into_gguf(tmp_path):
    sizes = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    base = write_model(tmp_path / "base", **sizes)
    convert(str(base), str(tmp_path / "orbax"), form="orbax", console=QUIET)
    np.testing.assert_array_equal(
        load_model(str(tmp_path / "orbax")).logits(TOKENS), load_model(str(base)).logits(TOKENS)
    )
    convert(str(tmp_path / "orbax"), str(tmp_path / "back"), console=QUIET)
    assert_same(tensors_of(tmp_path / "back"), tensors_of(base))
    convert(str(tmp_path / "orbax"), str(tmp_path / "experts.gguf"), form="gguf", console=QUIET)
    np.testing.assert_array_equal(
        load_model(str(tmp_path / "experts.gguf")).logits(TOKENS), load_model(str(base)).logits(TOKENS)
    )


@pytest.mark.parametrize("damage", ["flip", "missing"])
def test_a_damaged_orbax_folder_is_refused(model, tmp_path, damage):
    convert(str(model), str(tmp_path / "orbax"), form="orbax", console=QUIET)
    chunk = max((p for p in (tmp_path / "orbax" / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "missing":
        chunk.unlink()
    else:
        raw = bytearray(chunk.read_bytes())
        raw[len(raw) // 2] ^= 1
        chunk.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"differs from its manifest"):
        load_model(str(tmp_path / "orbax"))


def test_a_merged_adapter_has_the_logits_of_the_live_one(model, adapter, tmp_path):
    done = convert(str(adapter), str(tmp_path / "merged"), console=QUIET)
    assert done["checks"]["tensors"] == "bitwise" and done["checks"]["logits"]["jaxft"] < 1e-4
    live, merged = load_model(str(adapter)).logits(TOKENS), load_model(str(tmp_path / "merged")).logits(TOKENS)
    np.testing.assert_allclose(merged, live, atol=1e-5 * np.abs(live).max())
    assert np.abs(live - load_model(str(model)).logits(TOKENS)).max() > 0.1 * np.abs(live).max()


def test_merging_rounds_once_from_float32(tmp_path):
    base = write_model(tmp_path / "base", dtype="bfloat16")
    lora = write_adapter(tmp_path / "lora", base)
    convert(str(lora), str(tmp_path / "merged"), console=QUIET)
    convert(str(lora), str(tmp_path / "exact"), dtype="float32", console=QUIET)
    exact, merged = tensors_of(tmp_path / "exact"), tensors_of(tmp_path / "merged")
    assert_same(merged, {name: array.astype("bfloat16") for name, array in exact.items()})
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_casting_writes_the_rounded_source(model, tmp_path, dtype):
    convert(str(model), str(tmp_path / "out"), dtype=dtype, console=QUIET)
    assert_same(tensors_of(tmp_path / "out"), {n: a.astype(dtype) for n, a in tensors_of(model).items()})


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    base = write_model(tmp_path / "base")
    tensors = tensors_of(base)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e5
    from safetensors.numpy import save_file

    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ExportError, match=r"'model\.norm\.weight' has values beyond 65504"):
        convert(str(base), str(tmp_path / "out"), dtype="float16", console=QUIET)
    assert os.listdir(tmp_path) == ["base"]


# -- interruptions ----------------------------------------------------------------------------------


def command(source: Path, to: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "jaxft.cli", "convert", str(source), str(to), *options]


# Writes one tensor in half a second, so that there is a middle to be stopped in. Ctrl-C is heard even where a shell
# that put the suite in the background has handed down that it be ignored.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from jaxft.checkpoint import safetensors_writer
from jaxft.checkpoint.gguf import write as gguf_write
from jaxft import cli
def slowly(function):
    def slow(*args, **kwargs):
        time.sleep(0.3)
        return function(*args, **kwargs)
    return slow
safetensors_writer._bytes_of = slowly(safetensors_writer._bytes_of)
gguf_write._encode = slowly(gguf_write._encode)
sys.exit(cli.main(sys.argv[1:]))
"""


def interrupt(source: Path, to: Path, number: int, *options: str, when) -> subprocess.CompletedProcess:
    """Starts a slow conversion, and sends it a signal once `when(unfinished folder)` is true."""
    arguments = ["convert", str(source), str(to), *options]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], cwd=root, env=env, stderr=subprocess.PIPE, text=True
    )
    unfinished = to.with_name(f"{to.name}.jaxft.partial") / "out"
    while process.poll() is None and not (unfinished.is_dir() and when(unfinished)):
        time.sleep(0.01)
    assert process.poll() is None, f"it ended first: {process.stderr.read()}"
    process.send_signal(number)
    process.wait()
    return process


def one_shard(folder: Path) -> bool:
    return len(list(folder.glob("model-*.safetensors"))) >= 2


@pytest.mark.parametrize("number", [pytest.param(signal.SIGKILL, marks=pytest.mark.slow), signal.SIGINT])
def test_an_interrupted_conversion_leaves_no_target_and_goes_on(model, tmp_path, number):
    to = tmp_path / "out"
    process = interrupt(model, to, number, "--shard_size=100KB", when=one_shard)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert not to.exists()
    unfinished = tmp_path / "out.jaxft.partial" / "out"
    assert not (unfinished / "config.json").exists()
    finished = {f: f.stat().st_mtime_ns for f in unfinished.glob("model-*.safetensors")}
    assert len(finished) >= 2
    convert(str(model), str(to), max_shard_bytes=100_000, console=QUIET)
    kept = [f for f, mtime in finished.items() if (to / f.name).stat().st_mtime_ns == mtime]
    assert len(kept) == len(finished), "whole files are not written again"
    assert os.listdir(tmp_path) == ["out"]
    assert_same(tensors_of(to), tensors_of(model))


@pytest.mark.parametrize("change", ["source", pytest.param("dtype", marks=pytest.mark.slow)])
def test_what_was_written_of_another_source_or_type_is_not_kept(tmp_path, change):
    base, to = write_model(tmp_path / "base"), tmp_path / "out"
    interrupt(base, to, signal.SIGKILL, "--shard_size=100KB", when=one_shard)
    if change == "source":
        tensors = {name: array + 1 for name, array in tensors_of(base).items()}
        from safetensors.numpy import save_file

        save_file(tensors, base / "model.safetensors")
    dtype = "bfloat16" if change == "dtype" else None
    convert(str(base), str(to), max_shard_bytes=100_000, dtype=dtype, console=QUIET)
    assert_same(tensors_of(to), {n: a.astype(dtype or a.dtype) for n, a in tensors_of(base).items()})


def test_an_interrupted_gguf_is_cleaned_up(model, tmp_path):
    to = tmp_path / "out.gguf"
    begun = lambda folder: (folder / "model.gguf").exists()  # noqa: E731
    interrupt(model, to, signal.SIGINT, when=begun)
    assert os.listdir(tmp_path) == []
    interrupt(model, to, signal.SIGKILL, when=begun)
    assert sorted(os.listdir(tmp_path)) == ["out.gguf.jaxft.partial", "out.gguf.jaxft_lock.json"]
    convert(str(model), str(to), console=QUIET)
    assert os.listdir(tmp_path) == ["out.gguf"]


def test_two_conversions_to_one_target_do_not_mix(model, tmp_path):
    with lock(tmp_path / "out", "jaxft convert"):
        with pytest.raises(FolderInUseError, match=r"out is being written by `jaxft convert`"):
            convert(str(model), str(tmp_path / "out"), console=QUIET)
    assert os.listdir(tmp_path) == []


def test_a_comparison_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    write = convert_targets.write_hf

    def damage(target, tensors):
        write(target, tensors)
        file = target.folder / "model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)

    monkeypatch.setattr(convert_targets, "write_hf", damage)
    with pytest.raises(ExportError, match=r"reads back differently from the source"):
        convert(str(model), str(tmp_path / "out"), console=QUIET)
    assert os.listdir(tmp_path) == []


# -- the command, and refusals ----------------------------------------------------------------------


def test_the_command_prints_what_was_compared(model, tmp_path, capsys):
    assert cli.main(["convert", str(model), str(tmp_path / "q.gguf"), "--dtype=q8_0", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["checks"] == {"tensors": "equal to the library's quantisation"} and done["dtype"] == "q8_0"
    assert cli.main(["convert", str(model), str(tmp_path / "hf")]) == 0
    assert "tensors: bitwise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"form": "onnx"}, r"--to=onnx is not one of hf"),
        ({"dtype": "q8_0"}, r"--dtype=q8_0 is not one of float32, bfloat16, float16, which hf takes"),
        ({"form": "gguf"}, r"writes a file that ends in \.gguf"),
        ({"form": "gguf-adapter", "to": "a.gguf"}, r"is not a PEFT folder"),
    ],
)
def test_requests_that_make_no_sense_are_refused(model, tmp_path, options, match):
    to = str(tmp_path / options.pop("to", "out"))
    with pytest.raises(ConfigError, match=match):
        convert(str(model), to, console=QUIET, **options)


def test_targets_in_the_way_are_refused(model, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ExportError, match=r"already there"):
        convert(str(model), str(tmp_path / "full"), console=QUIET)
    shutil.copytree(tmp_path / "full", tmp_path / "out.jaxft.partial")
    with pytest.raises(ExportError, match=r"in the way and is not an unfinished conversion"):
        convert(str(model), str(tmp_path / "out"), console=QUIET)
    with pytest.raises(ExportError, match=r"local or mounted folder.*gcloud storage cp --recursive"):
        convert(str(model), "gs://bucket/out", console=QUIET)


def test_gguf_without_a_tokenizer_is_refused(model, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, bare / name)
    with pytest.raises(ExportError, match=r"needs a tokenizer"):
        convert(str(bare), str(tmp_path / "out.gguf"), console=QUIET)


def test_a_tokenizer_that_llama_cpp_would_not_load_is_refused(model, tmp_path):
    base = shutil.copytree(model, tmp_path / "base")
    load_tokenizer(ASSETS / "smoke").save(base)
    with pytest.raises(ExportError, match=r"has no merges"):
        convert(str(base), str(tmp_path / "out.gguf"), console=QUIET)


def test_weights_that_do_not_fit_their_config_and_unknown_fields_are_refused_before_writing(tmp_path):
    base = write_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.2\."):
        convert(str(base), str(tmp_path / "out"), console=QUIET)
    (base / "config.json").write_text(json.dumps(config | {"window_scale": 3}))
    with pytest.raises(ModelError, match=r"window_scale=3 \(unknown\)"):
        convert(str(base), str(tmp_path / "out"), console=QUIET)
    assert os.listdir(tmp_path) == ["base"]


def free(monkeypatch, size):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))


@pytest.mark.parametrize(("to", "dtype"), [("out", None), ("a.gguf", "q8_0"), ("orbax", "bfloat16"), ("l.gguf", None)])
def test_a_disk_without_room_is_refused_before_anything_is_written(model, adapter, tmp_path, monkeypatch, to, dtype):
    form = {"orbax": "orbax", "l.gguf": "gguf-adapter"}.get(to)
    free(monkeypatch, 50_000_000)
    with pytest.raises(ExportError, match=r"needs 0\.07 GB and the disk of .* has 0\.05 GB left: make room"):
        convert(str(adapter if to == "l.gguf" else model), str(tmp_path / to), form=form, dtype=dtype, console=QUIET)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("form", "dtype", "target"),
    [("hf", "bfloat16", "out"), ("gguf", "q8_0", "out.gguf"), ("gguf", "float16", "out.gguf")],
)
def test_the_room_that_is_asked_for_is_what_is_written(model, tmp_path, form, dtype, target, monkeypatch):
    asked = []
    monkeypatch.setattr(conversions, "_check_space", lambda to, size: asked.append(size))
    convert(str(model), str(tmp_path / target), form=form, dtype=dtype, console=QUIET)
    written = tmp_path / target if form == "gguf" else tmp_path / target / "model.safetensors"
    # The rest is the header and, in GGUF, the tokenizer.
    assert 0 <= written.stat().st_size - asked[0] < 40_000


def test_what_an_interrupted_call_left_needs_no_more_room(model, tmp_path, monkeypatch):
    size = sum(array.nbytes for array in tensors_of(model).values())
    left = tmp_path / "out.jaxft.partial" / "out"
    left.mkdir(parents=True)
    (tmp_path / "out.jaxft.partial" / conversions.STATE).write_text("")
    (left / "model-00001-of-00002.safetensors").write_bytes(bytes(size // 2))
    free(monkeypatch, size + SMALL_FILES - size // 2 - 1)
    with pytest.raises(ExportError, match="make room"):
        convert(str(model), str(tmp_path / "out"), console=QUIET)
    assert (left / "model-00001-of-00002.safetensors").is_file()
    free(monkeypatch, size + SMALL_FILES - size // 2)
    convert(str(model), str(tmp_path / "out"), console=QUIET)


def test_a_value_that_is_no_number_is_not_converted(tmp_path):
    base = write_model(tmp_path / "base")
    tensors = {name: array.copy() for name, array in tensors_of(base).items()}
    tensors["model.norm.weight"][3] = np.nan
    from safetensors.numpy import save_file

    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has 1 NaN and 0 infinite values"):
        convert(str(base), str(tmp_path / "out"), console=QUIET)
    assert os.listdir(tmp_path) == ["base"]
