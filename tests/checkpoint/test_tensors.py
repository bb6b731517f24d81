"""Safetensors folders: what is read equals the safetensors library; what is unsafe or damaged is refused."""

import json
import os
import struct
import weakref

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file, save_file

from jaxft.checkpoint import safetensors_writer
from jaxft.checkpoint.safetensors_writer import plan_shards, write_safetensors, write_sharded
from jaxft.checkpoint.tensors import SafetensorsFolder, TensorSpec
from jaxft.errors import CheckpointError, ExportError


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.normal(size=(6, 4)).astype(np.float32),
        "cube": rng.normal(size=(3, 4, 5)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(7, np.float32),
        "empty": np.zeros((0, 3), np.float16),
        "eights": rng.normal(size=5).astype(ml_dtypes.float8_e4m3fn),
        "ids": np.arange(7),
        "flags": np.array([True, False, True]),
    }


def lazy(tensors):
    return {name: (TensorSpec(a.shape, a.dtype), lambda a=a: a) for name, a in tensors.items()}


def write_raw(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def entry(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def sharded(folder, weight_map=None, **shards):
    """A folder of float32 shards `a=("x",)` -> a.safetensors with tensor x, and an index."""
    for file, names in shards.items():
        save_file({name: np.ones(2, np.float32) for name in names}, folder / f"{file}.safetensors")
    if weight_map is None:
        weight_map = {name: f"{file}.safetensors" for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_reads_what_the_library_wrote(tmp_path):
    native = {name: a for name, a in arrays().items() if name not in ("cube", "eights")}  # numpy's own dtypes
    save_file(native, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = SafetensorsFolder(tmp_path)
    assert source.specs() == {k: TensorSpec(v.shape, v.dtype) for k, v in native.items()}
    for name, array in native.items():
        np.testing.assert_array_equal(source.read(name), array)


@pytest.mark.parametrize(
    "index",
    [
        None,
        (slice(1, 3),),
        (slice(None), slice(1, 3)),
        (slice(1, 2), slice(None), slice(2, 5)),
        (slice(0, 3), slice(3, 4), slice(None)),
        (slice(2, 2),),
        (slice(-1, None), slice(0, 100)),
    ],
)
def test_blocks_equal_numpy_slices(tmp_path, index):
    tensors = arrays()
    write_safetensors(tmp_path / "model.safetensors", lazy(tensors))
    block = SafetensorsFolder(tmp_path).read("cube", index)
    assert block.dtype == tensors["cube"].dtype
    np.testing.assert_array_equal(block, tensors["cube"][index or ()])


def test_only_the_bytes_of_a_block_are_read(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "model.safetensors", lazy({"w": np.arange(100, dtype=np.float32).reshape(10, 10)}))
    source, read, preadv = SafetensorsFolder(tmp_path), [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: read.append(sum(map(len, b))) or preadv(fd, b, at))
    source.read("w", (slice(2, 4),))
    source.read("w", (slice(2, 4), slice(0, 3)))
    assert read == [80, 12, 12]


def test_bad_requests(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", lazy(arrays()))
    source = SafetensorsFolder(tmp_path)
    with pytest.raises(CheckpointError, match=r"no tensor 'matrx'.*Did you mean 'matrix'"):
        source.read("matrx")
    with pytest.raises(ValueError, match="step 2"):
        source.read("matrix", (slice(0, 4, 2),))
    with pytest.raises(ValueError, match="3 slices for the 2 axes"):
        source.read("matrix", (slice(None),) * 3)


def test_a_file_cut_after_opening_is_noticed(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", lazy(arrays()))
    source = SafetensorsFolder(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 600)
    with pytest.raises(CheckpointError, match="longer when it was opened"):
        [source.read(name) for name in source.specs()]


def test_adapter_file_by_name(tmp_path):
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "adapter_model.safetensors")
    assert list(SafetensorsFolder(tmp_path, "adapter_model.safetensors").specs()) == ["x"]


# Writing


def test_the_library_reads_what_is_written(tmp_path):
    tensors = arrays()
    write_safetensors(tmp_path / "model.safetensors", lazy(tensors), {"format": "pt"})
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
    loaded = dict(deserialize((tmp_path / "model.safetensors").read_bytes()))
    for name in tensors:
        assert loaded[name]["data"] == tensors[name].tobytes()
        assert SafetensorsFolder(tmp_path).read(name).tobytes() == tensors[name].tobytes()


def test_bfloat16_is_torchs(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch

    array = arrays()["cube"]
    write_safetensors(tmp_path / "model.safetensors", lazy({"cube": array}))
    loaded = load_torch(tmp_path / "model.safetensors")["cube"]
    assert loaded.dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded.float().numpy(), array.astype(np.float32))


def test_one_tensor_is_made_at_a_time_and_every_tensor_is_aligned(tmp_path):
    tensors, made = arrays(), []

    def make(array):
        assert all(last() is None for last in made), "the last tensor is still in memory"
        fresh = array.copy()
        made.append(weakref.ref(fresh))
        return fresh

    write_safetensors(
        tmp_path / "model.safetensors",
        {name: (TensorSpec(a.shape, a.dtype), lambda a=a: make(a)) for name, a in tensors.items()},
    )
    raw = (tmp_path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert all(h["data_offsets"][0] % tensors[name].dtype.itemsize == 0 for name, h in header.items())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, lazy({"x": np.ones(3, np.float32)}))
    with pytest.raises(ExportError, match=r"'x' was declared .*, but is \(4,\) float32"):
        write_safetensors(path, {"x": (TensorSpec((3,), np.dtype(np.float32)), lambda: np.ones(4, np.float32))})
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert load_file(path)["x"].shape == (3,)
    with pytest.raises(ExportError, match="complex64"):
        write_safetensors(path, lazy({"x": np.ones(3, np.complex64)}))


def test_shards_are_those_of_huggingface_hub(tmp_path):
    from huggingface_hub import split_torch_state_dict_into_shards

    torch = pytest.importorskip("torch")
    sizes = {"a": 10, "b": 30, "c": 5, "d": 50, "e": 10, "f": 10, "g": 30}
    specs = {name: TensorSpec((n,), np.dtype(np.float32)) for name, n in sizes.items()}
    theirs = split_torch_state_dict_into_shards({n: torch.zeros(s) for n, s in sizes.items()}, max_shard_size=200)
    ours = plan_shards(specs, 200)
    assert {file: list(names) for file, names in ours.files.items()} == theirs.filename_to_tensors
    assert ours.index["weight_map"] == theirs.tensor_to_filename
    assert ours.index["metadata"] == {"total_parameters": 145, "total_size": theirs.metadata["total_size"]}
    assert list(plan_shards(specs, 60).files.values())[-1] == ("g",)  # larger than a shard: its own file
    one = plan_shards(specs, 10_000)
    assert list(one.files) == ["model.safetensors"] and one.index is None
    with pytest.raises(ExportError, match="at most 0 bytes"):
        plan_shards(specs, 0)


def test_sharded_round_trip(tmp_path):
    tensors = arrays()
    files = write_sharded(tmp_path, lazy(tensors), max_bytes=100)
    assert files[-1] == "model.safetensors.index.json" and len(files) > 3
    assert sorted(os.listdir(tmp_path)) == sorted(files)
    source = SafetensorsFolder(tmp_path)
    for name, array in tensors.items():
        assert source.read(name).tobytes() == array.tobytes()
    with pytest.raises(ExportError, match="already holds"):
        write_sharded(tmp_path, lazy(tensors), max_bytes=10_000)


# Refusals


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/hostname", "sub/x.safetensors", "..", "", "a\\b"])
def test_refuses_an_index_that_leaves_the_folder(tmp_path, file):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "other.safetensors")
    sharded(folder, weight_map={"x": file})
    with pytest.raises(CheckpointError, match="not a file name in that folder"):
        SafetensorsFolder(folder)


def test_refuses_links_out_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "other.safetensors")
    (folder / "model.safetensors").symlink_to("../other.safetensors")
    with pytest.raises(CheckpointError, match=r"is a link to .*other\.safetensors, outside"):
        SafetensorsFolder(folder)


def test_follows_links_within_a_hugging_face_cache_entry(tmp_path):
    entry = tmp_path / "models--owner--name"
    snapshot = entry / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (entry / "blobs").mkdir()
    save_file({"x": np.ones(2, np.float32)}, entry / "blobs" / "feed")
    (snapshot / "model.safetensors").symlink_to("../../blobs/feed")
    assert SafetensorsFolder(snapshot).read("x").tolist() == [1, 1]
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "other.safetensors")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../other.safetensors")
    with pytest.raises(CheckpointError, match="outside"):
        SafetensorsFolder(snapshot)


@pytest.mark.parametrize(
    ("length", "header"), [(10**6, b"{}"), (100_000_001, b"{}"), (2**63, b"{}"), (None, b""), (3, b"{")]
)
def test_refuses_bad_header_lengths(tmp_path, length, header):
    path = tmp_path / "model.safetensors"
    write_raw(path, header, length=length)
    if length == 100_000_001:
        os.truncate(path, 100_001_000)  # sparse: long enough, and still refused
    with pytest.raises(CheckpointError, match=r"header claims|not valid JSON"):
        SafetensorsFolder(tmp_path)


def test_refuses_a_file_shorter_than_its_prefix(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\1\0\0")
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize(
    ("header", "nbytes", "match"),
    [
        ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, 12, "'b' overlaps 'a'"),
        ({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, 20, "'b' leaves a hole of 4 bytes after 'a'"),
        ({"a": entry([2], 4, 12)}, 12, "leaves a hole of 4 bytes"),
        ({"a": entry([2], 0, 8)}, 12, "4 bytes after the last tensor 'a' belong to none"),
        ({"a": entry([2], 0, 8)}, 4, "'a' ends at data byte 8, but the file has 4"),
        ({"a": entry([3], 0, 8)}, 8, "takes 12 bytes"),
        ({"a": entry([2], 8, 0)}, 8, "takes 8 bytes"),
        ({"a": entry([2], 0, 8, "BF16")}, 8, "takes 4 bytes"),
        ({"a": entry([2], 0, 8, "F4")}, 8, "dtype 'F4'"),
        ({"a": entry([2], 0, 8, ["F32"])}, 8, "dtype"),
        ({"a": entry([-2], 0, 8)}, 8, "not a list of sizes"),
        ({"a": entry([True], 0, 4)}, 4, "not a list of sizes"),
        ({"a": entry([2.0], 0, 8)}, 8, "not a list of sizes"),
        ({"a": entry([2**62, 2**62, 4], 0, 8)}, 8, "takes"),
        ({"a": {"dtype": "F32"}}, 0, "not dtype, shape and data_offsets"),
        ({"a": entry([2], 0, 8) | {"extra": 1}}, 8, "not dtype, shape and data_offsets"),
        ({"a": 3}, 0, "not dtype, shape and data_offsets"),
        (b'{"a":1,"a":2}', 0, "the name .a. is there twice"),
        (b"[1]", 0, "not a JSON object"),
        (b"[" * 100_000, 0, "not valid JSON"),
    ],
)
def test_refuses_bad_headers(tmp_path, header, nbytes, match):
    write_raw(tmp_path / "model.safetensors", header, b"\0" * nbytes)
    with pytest.raises(CheckpointError, match=match):
        SafetensorsFolder(tmp_path)


def test_refuses_shards_that_disagree_with_their_index(tmp_path):
    def folder(name, **kwargs):
        path = tmp_path / name
        path.mkdir()
        sharded(path, **kwargs)
        return path

    a, b = "a.safetensors", "b.safetensors"
    assert set(SafetensorsFolder(folder("good", a=["x"], b=["y"])).specs()) == {"x", "y"}
    cases = {
        "'x' is in both": {"a": ["x"], "b": ["x", "y"], "weight_map": {"x": a, "y": b}},
        "no file 'c.safetensors'": {"a": ["x"], "weight_map": {"x": a, "y": "c.safetensors"}},
        "places tensor 'z' in a.safetensors, which does not hold it": {"a": ["x"], "weight_map": {"x": a, "z": a}},
        "places tensor 'y' in a": {"a": ["x"], "b": ["y", "w"], "weight_map": {"x": a, "y": a, "w": b}},
        r"1 tensors are not in the index: y$": {"a": ["x", "y"], "weight_map": {"x": a}},
        "no 'weight_map'": {"a": ["x"], "weight_map": {}},
    }
    for n, (match, kwargs) in enumerate(cases.items()):
        with pytest.raises(CheckpointError, match=match):
            SafetensorsFolder(folder(str(n), **kwargs))
    both = folder("both", a=["x"])
    save_file({"x": np.ones(2, np.float32)}, both / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both"):
        SafetensorsFolder(both)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_never_opens_pickles(tmp_path, pickle):
    (tmp_path / pickle).write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=f"only {pickle}. jaxft never opens pickle files.*convert with"):
        SafetensorsFolder(tmp_path)


def test_refuses_folders_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        SafetensorsFolder(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no safetensors at all"):
        SafetensorsFolder(tmp_path)
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"only model-00001-of-00002\.safetensors"):
        SafetensorsFolder(tmp_path)


def test_a_large_tensor_is_asked_for_in_blocks_of_its_leading_axis(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "BLOCK_BYTES", 100)
    values = {
        "cube": np.arange(7 * 3 * 4, dtype=np.float32).reshape(7, 3, 4),  # 48 bytes a row: 2 rows
        "wide": np.arange(2 * 60, dtype=np.float32).reshape(2, 60),  # a row is more than a block
        "small": np.arange(25, dtype=np.float32),
        "scalar": np.float32(3).reshape(()),
    }
    asked = []

    def lazily(name):
        def make(index=None):
            asked.append((name, index))
            return values[name][index or ()]

        return TensorSpec(values[name].shape, values[name].dtype), make

    tensors = {name: lazily(name) for name in values}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    rows = [("cube", (slice(a, min(a + 2, 7)),)) for a in (0, 2, 4, 6)]
    wanted = [*rows, ("wide", (slice(0, 1),)), ("wide", (slice(1, 2),)), ("small", None), ("scalar", None)]
    assert asked == wanted
    for name, array in load_file(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(array, values[name])
    # The other processes ask for the same blocks, in the same order.
    asked.clear()
    safetensors_writer.gather_sharded(tensors)
    assert asked == wanted
    with pytest.raises(ExportError, match=r"tensor 'x' was declared .*, but rows 0 to 1 are \(2, 50\) float32"):
        short = TensorSpec((3, 50), np.dtype(np.float32)), lambda index: np.ones((2, 50), np.float32)
        write_safetensors(tmp_path / "short.safetensors", {"x": short})
