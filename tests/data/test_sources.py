"""Rows from files, datasets folders and TFDS sets, and the held-out share."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.config import DataConfig
from jaxft.data.sources import open_rows, train_and_eval
from jaxft.errors import DataError

datasets = pytest.importorskip("datasets")


def test_jsonl_lines_keep_their_numbers(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "é"}\n\n{"text": "b"}\nnot json\n[1]\n', encoding="utf-8")
    rows = open_rows(str(path))
    assert (len(rows), rows[0], rows[1]) == (4, {"text": "é"}, {"text": "b"})
    assert rows.where(1) == "a.jsonl line 3" and "4 lines" in rows.describe()
    with pytest.raises(DataError, match=r"a.jsonl line 4 is not JSON"):
        rows[2]
    with pytest.raises(DataError, match=r"a.jsonl line 5 is list, not an object"):
        rows[3]


def test_gzipped_jsonl(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n'))
    assert open_rows(str(path))[0] == {"text": "x"}
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match=r"cannot read"):
        open_rows(str(path))


def test_missing_file_names_a_near_one(jsonl, tmp_path):
    jsonl([{}], name="train.jsonl")
    with pytest.raises(DataError, match=r"Did you mean 'train.jsonl'"):
        open_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"There is no folder"):
        open_rows(str(tmp_path / "nowhere" / "x.jsonl"))
    with pytest.raises(DataError, match=r"no data file .*train.txt'. Did you mean 'train.jsonl'"):
        open_rows(str(tmp_path / "train.txt"))


def test_saved_datasets_folder(tmp_path):
    train = datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "q"}]], "n": [1]})
    datasets.DatasetDict(train=train, test=train).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    for name in ("both", "one"):
        rows = open_rows(str(tmp_path / name))
        assert rows[0] == {"messages": [{"role": "user", "content": "q"}], "n": 1}
        assert rows.digest() == open_rows(str(tmp_path / "both"), split="test").digest(), "of equal contents"
    assert "row 0 of" in rows.where(0) and "1 row)" in rows.describe()
    with pytest.raises(DataError, match=r"no split 'tests'; it has train, test. Did you mean 'test'"):
        open_rows(str(tmp_path / "both"), split="tests")


def test_folder_of_parquet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": ["x", "y"]}).to_parquet(tmp_path / "set" / "train.parquet")
    rows = open_rows(str(tmp_path / "set"))
    assert [rows[i] for i in range(2)] == [{"text": "x"}, {"text": "y"}]
    with pytest.raises(DataError, match=r"no split 'validation'"):
        open_rows(str(tmp_path / "set"), split="validation")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no files with rows .*: it is empty"):
        open_rows(str(tmp_path / "empty"))


@pytest.fixture(scope="module")
def little(tmp_path_factory):
    pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from little_tfds.little import Little
    finally:
        sys.path.pop(0)
    Little(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_tfds_set_by_name(little):
    rows = open_rows("tfds:little", tfds_data_dir=little)
    assert len(rows) == 5 and len(open_rows("tfds:little:1.0.0", split="test", tfds_data_dir=little)) == 2
    found = sorted((rows[i] for i in range(5)), key=lambda row: row["prompt"])
    assert (found[2]["prompt"], found[2]["completion"]) == ("Was kommt nach 2? é:", " 3")
    assert found[2]["talk"] == {"role": ["user", "assistant"], "content": ["é2?", "2"]}
    with pytest.raises(DataError, match=r"no split 'tests'; it has"):
        open_rows("tfds:little", split="tests", tfds_data_dir=little)
    with pytest.raises(DataError, match=r"TFDS knows no set 'litle_set'"):
        open_rows("tfds:litle_set", tfds_data_dir=little)
    with pytest.raises(DataError, match=r"not prepared in"):
        open_rows("tfds:mnist", tfds_data_dir=little)


def test_tfds_is_read_without_tensorflow(little):
    program = (
        "import sys; from jaxft.data.sources import open_rows; "
        f"assert open_rows('tfds:little', tfds_data_dir={little!r})[0]['prompt']; "
        "assert 'tensorflow' not in sys.modules and 'torch' not in sys.modules"
    )
    root = str(Path(__file__).resolve().parents[2])
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root)


def texts(rows):
    return [rows[i]["text"] for i in range(len(rows))]


def test_held_out_share_is_drawn_by_seed(jsonl):
    path = jsonl([{"text": str(i)} for i in range(100)])
    config = DataConfig(train=path, eval_fraction=0.2)
    train, held_out = train_and_eval(config, seed=3)
    assert len(train) == 80 and len(held_out) == 20
    assert sorted(texts(train) + texts(held_out), key=int) == [str(i) for i in range(100)]
    assert texts(train) == sorted(texts(train), key=int)
    assert texts(train_and_eval(config, seed=3)[1]) == texts(held_out) != texts(train_and_eval(config, seed=4)[1])
    limited, same = train_and_eval(DataConfig(train=path, eval_fraction=0.2, limit=10, eval_limit=5), seed=3)
    assert texts(limited) == texts(train)[:10] and texts(same) == texts(held_out)[:5]
    assert same.where(0) == f"rows.jsonl line {int(texts(same)[0]) + 1}"
    assert "first 10 rows of 80 rows" in limited.describe()


def test_eval_of_its_own(jsonl):
    train, held_out = jsonl([{"text": "a"}]), jsonl([{"text": "b"}], name="eval.jsonl")
    rows, other = train_and_eval(DataConfig(train=train, eval=held_out), seed=0)
    assert (texts(rows), texts(other)) == (["a"], ["b"])
    assert train_and_eval(DataConfig(train=train), seed=0)[1] is None
    with pytest.raises(DataError, match=r"leaves no row to train on"):
        train_and_eval(DataConfig(train=train, eval_fraction=0.5), seed=0)


def test_hub_name_offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"datasets cannot load 'hf://nobody/nothing'.*Check the name"):
        open_rows("hf://nobody/nothing")


def test_libraries_that_are_not_installed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"pip install 'jaxft\[datasets\]'"):
        open_rows("hf://owner/name")
    with pytest.raises(DataError, match=r"pip install 'jaxft\[tfds\]'"):
        open_rows("tfds:little")


def test_bytes_that_are_not_text(tmp_path):
    table = datasets.Dataset.from_dict({"text": [b"\xff"]})
    table.save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match=r"row 0 of .* not UTF-8"):
        open_rows(str(tmp_path / "set"))[0]


def test_real_rows(shared_data):
    rows = open_rows(str(shared_data / "gsm8k" / "train.jsonl"))
    assert len(rows) == 7473 and set(rows[7472]) == {"question", "answer"}
    assert json.dumps(rows[0])
