"""Models of several GGUF files, as the gguf library splits them: any part stands for the whole."""

import shutil

import gguf
import numpy as np
import pytest
from test_gguf import LAYERS, hf_tensors, interleave, settings

from jaxft.checkpoint.gguf import GGUFFile
from jaxft.errors import CheckpointError
from jaxft.files.gguf.header import part_files, read_header


def write(folder, most, values=0.0, name="model.gguf"):
    """Writes a float32 model with at most `most` tensors in a file; returns its tensors by Hugging Face name."""
    hf = {key: value + np.float32(values) for key, value in hf_tensors().items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    writer = gguf.GGUFWriter(folder / name, "llama", split_max_tensors=most)
    for key, value in settings().items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)
    for key, array in hf.items():
        heads = 4 if "q_proj" in key else 2 if "k_proj" in key else None
        base, _, suffix = key.rpartition(".")
        writer.add_tensor(f"{names.get_name(base)}.{suffix}", array if heads is None else interleave(array, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return hf


@pytest.fixture
def parts(tmp_path):
    """(the files in order, the tensors)"""
    expected = write(tmp_path, most=8)
    files = sorted(str(file) for file in tmp_path.glob("*.gguf"))
    assert len(files) == 3
    return files, expected


def test_any_part_reads_the_whole_model(parts):
    files, expected = parts
    for file in files:
        model = GGUFFile(file)
        assert model.path == files[0] and part_files(file) == files
        assert set(model.specs()) == set(expected)
        for name, array in expected.items():
            np.testing.assert_array_equal(model.read(name), array)
    assert {tensor.file for tensor in read_header(files[1]).tensors.values()} == set(files)
    block = (slice(3, 20), slice(2, 9))
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(GGUFFile(files[2]).read(name, block), expected[name][block])


def test_a_whole_file_is_its_only_part(tmp_path):
    write(tmp_path, most=0)
    assert part_files(str(tmp_path / "model.gguf")) == [str(tmp_path / "model.gguf")]


def test_missing_parts_are_named(parts, tmp_path):
    files, _ = parts
    (tmp_path / "model-00002-of-00003.gguf").unlink()
    for file in (files[0], files[2]):
        with pytest.raises(
            CheckpointError, match=r"3 files, and 1 of them are missing: model-00002-of-00003.gguf\. Put"
        ):
            read_header(file)


def test_a_renamed_part_is_refused(parts, tmp_path):
    files, _ = parts
    shutil.copy(files[0], tmp_path / "mine.gguf")
    with pytest.raises(CheckpointError, match=r"mine.gguf is a part of a model of 3 files, .* the names that they had"):
        read_header(tmp_path / "mine.gguf")
    shutil.copy(files[2], files[1])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.gguf should be part 1 of 3, .* says part 2 of 3"):
        read_header(files[0])


def test_parts_of_another_model_are_refused(parts, tmp_path):
    files, _ = parts
    other = tmp_path / "other"
    other.mkdir()
    write(other, most=7)
    donors = sorted(other.glob("*.gguf"))
    assert len(donors) == 3
    shutil.copy(donors[1], files[1])
    with pytest.raises(CheckpointError, match=r"(is in .* and in|tensors, but there should be)"):
        read_header(files[0])
