"""Every kind of file gives the rows that were written to it, and what is broken is named with its mend."""

import bz2
import csv
import datetime
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import shutil
import subprocess

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from jaxft.data.sources import JsonlRows, TableRows, is_here, open_rows, text
from jaxft.data.sources.file_kinds import FileKind, kind_by_name
from jaxft.data.sources.listing import is_pattern
from jaxft.errors import DataError

ROWS = [
    {"prompt": "007", "completion": "NA"},
    {"prompt": "null", "completion": "1e5"},
    {"prompt": 'a "quoted", cell\nof two lines', "completion": ""},
    {"prompt": "2024-01-02", "completion": "é 漢 \u2028 ,;\t"},
]


def jsonl_of(rows, separator="\n"):
    return separator.join(json.dumps(row) for row in rows).encode()


def csv_of(rows, **options):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def columns_of(rows, write):
    sink = pa.BufferOutputStream()
    write(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def arrow_of(new):
    def write(table, sink):
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)

    return write


def zstd_of(raw):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(raw)
    return sink.getvalue().to_pybytes()


KINDS = {
    "a.jsonl": jsonl_of(ROWS),
    "windows.jsonl": b"\xef\xbb\xbf" + jsonl_of(ROWS, "\r\n"),
    "mac.jsonl": jsonl_of(ROWS, "\r"),
    "blank.ndjson": b"\n \n" + jsonl_of(ROWS, "\n\t\n\n") + b"\n\r\n",
    "UP.JSONL": jsonl_of(ROWS),
    "a.jsonl.gz": gzip.compress(jsonl_of(ROWS)),
    "a.JSONL.GZ": gzip.compress(jsonl_of(ROWS[:2]) + b"\n") + gzip.compress(jsonl_of(ROWS[2:])),
    "a.jsonl.bz2": bz2.compress(jsonl_of(ROWS)),
    "a.jsonl.xz": lzma.compress(jsonl_of(ROWS)),
    "a.jsonl.zst": zstd_of(jsonl_of(ROWS)),
    "a.json": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "flat.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode() + b"\n",
    "lines.json": jsonl_of(ROWS),
    "objects.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "no_ending": json.dumps(ROWS).encode(),
    "lines.txt": jsonl_of(ROWS),
    "a.csv": csv_of(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + csv_of(ROWS),
    "quoted.csv": csv_of(ROWS, quoting=csv.QUOTE_ALL),
    "semicolons.csv": csv_of(ROWS, delimiter=";"),
    "excel.csv": b"sep=;\r\n" + csv_of(ROWS, delimiter=";"),
    "a.csv.gz": gzip.compress(csv_of(ROWS)),
    "a.tsv": csv_of(ROWS, delimiter="\t"),
    "a.parquet": columns_of(ROWS, lambda table, sink: parquet.write_table(table, sink, row_group_size=3)),
    "parquet_without_ending": columns_of(ROWS, parquet.write_table),
    "file.arrow": columns_of(ROWS, arrow_of(lambda sink, schema: pa.ipc.new_file(sink, schema))),
    "stream.arrow": columns_of(ROWS, arrow_of(lambda sink, schema: pa.ipc.new_stream(sink, schema))),
}


def all_of(rows):
    return [rows[index] for index in range(len(rows))]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_holds_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(KINDS[name])
    rows = open_rows(str(tmp_path / name))
    assert all_of(rows) == ROWS and [rows[i] for i in (3, 0, 2)] == [ROWS[i] for i in (3, 0, 2)]
    assert name in rows.where(2) and f"(4 {'lines' if rows.__class__ is JsonlRows else 'rows'})" in rows.describe()
    assert rows.digest() == hashlib.sha256(KINDS[name]).hexdigest()
    with pytest.raises(IndexError):
        rows[4]
    assert all_of(pickle.loads(pickle.dumps(rows))) == ROWS, "as another process reads it"
    address = f"memory://kinds/{name}"
    fsspec.filesystem("memory").pipe_file(f"/kinds/{name}", KINDS[name])
    remote = open_rows(address)
    assert all_of(remote) == ROWS and (remote.digest(), remote.where(2)) == (rows.digest(), rows.where(2))


@pytest.mark.parametrize("block", [1, 2, 7, 64, 10_000])
def test_lines_are_found_across_blocks(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text, "BLOCK", block)
    monkeypatch.setattr(text, "AHEAD", 5)
    lines = [b"{}", b"", b" {}", b"  ", b'{"a": "' + b"x" * 30 + b'"}', b"\r", b"", b"{}"]
    for end in (b"", b"\n", b"\n\n"):
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + end)
        rows = open_rows(str(tmp_path / "a.jsonl"))
        kept = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
        assert [(int(rows.where(i).split()[-1]), rows[i]) for i in range(len(rows))] == kept


def test_rows_are_named_by_the_line_on_which_they_begin(tmp_path):
    (tmp_path / "a.csv").write_bytes(KINDS["a.csv"])
    rows = open_rows(str(tmp_path / "a.csv"))
    assert [rows.where(i) for i in range(4)] == [f"a.csv line {line}" for line in (2, 3, 4, 6)]
    (tmp_path / "a.csv").write_bytes(KINDS["excel.csv"])
    assert open_rows(str(tmp_path / "a.csv")).where(3) == "a.csv line 7"
    (tmp_path / "a.json").write_text('[\n{},\n\n{"a":\n1},\n7]')
    rows = open_rows(str(tmp_path / "a.json"))
    assert [rows.where(i) for i in range(3)] == [
        f"a.json item {i + 1} (line {line})" for i, line in enumerate((2, 4, 6))
    ]
    with pytest.raises(DataError, match=r"a.json item 3 \(line 6\) is int, not an object"):
        rows[2]


def test_rows_within_an_object_are_read_by_their_field(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": [1], "data": ROWS, "deep": {"rows": ROWS[:1], "other": 1}}))
    assert all_of(open_rows(str(path), rows_field="data")) == ROWS
    assert all_of(open_rows(str(path), rows_field="deep.rows")) == ROWS[:1]
    with pytest.raises(DataError, match=r"one JSON object, not an array.*set data.rows_field='data'"):
        open_rows(str(path))
    with pytest.raises(DataError, match=r"no field 'dta'.*Did you mean 'data'\? Its fields: version, data, deep"):
        open_rows(str(path), rows_field="dta")
    with pytest.raises(DataError, match=r"no array of rows in field 'deep'"):
        open_rows(str(path), rows_field="deep")


def test_nulls_of_columns_stay_and_those_of_a_schema_go(tmp_path):
    rows = [
        {"text": None, "tools": [{"name": "a", "x": 1}], "at": datetime.datetime(2024, 1, 2, 3, 4), "raw": b"\xc3\xa9"},
        {"text": "b", "tools": [{"name": "b", "y": 2}], "at": None, "raw": b"b"},
    ]
    (tmp_path / "a.parquet").write_bytes(columns_of(rows, parquet.write_table))
    first, second = all_of(open_rows(str(tmp_path / "a.parquet")))
    assert first["text"] is None and first["tools"] == [{"name": "a", "x": 1}] and first["raw"] == "é"
    assert first["at"] == "2024-01-02T03:04:00" and second["at"] is None and second["tools"] == [{"name": "b", "y": 2}]


def test_lists_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "b").mkdir()
    for number, name in enumerate(("a.jsonl", "b/2.csv", "b/1.parquet", "b/10.jsonl", "with, comma.jsonl")):
        rows = [{"text": f"{number}"}]
        raw = {"csv": csv_of, "parquet": lambda rows: columns_of(rows, parquet.write_table)}.get(
            name.rpartition(".")[2]
        )
        (tmp_path / name).write_bytes((raw or jsonl_of)(rows))

    def texts(path):
        return "".join(row["text"] for row in all_of(open_rows(path)))

    assert texts(["a.jsonl", "b/*"]) == texts('["a.jsonl", "b/*"]') == texts("[a.jsonl,b/*]") == "0231"
    assert texts("b/2.csv, a.jsonl") == "10" and texts("with, comma.jsonl") == "4" and texts("~/b/*.jsonl") == "3"
    assert texts("**/*.jsonl") == "034" and texts("b/[12]*.*") == "231" and texts("b") == "231"
    assert is_here("b/*") and is_here("[a.jsonl, ~/b/2.csv]")
    assert not any(map(is_here, ("b/*.json", "a.jsonl, hf://owner/name", "tfds:x", "none.jsonl")))
    rows = open_rows("b/*")
    assert [rows.where(i) for i in range(3)] == ["row 0 of 1.parquet", "10.jsonl line 1", "2.csv line 2"]
    assert rows.describe() == "b/* (3 files, 3 rows)"
    assert rows.digest() == open_rows(["b/1.parquet", "./b/10.jsonl", str(tmp_path / "b/2.csv")]).digest()
    assert rows.digest() != open_rows(["b/2.csv", "b/1.parquet", "b/10.jsonl"]).digest()
    with pytest.raises(IndexError):
        rows[3]
    files = fsspec.filesystem("memory")
    for number in range(2):
        files.pipe_file(f"/globbed/{number}.jsonl", jsonl_of([{"text": str(number)}]))
    assert texts("memory://globbed/*.jsonl") == texts("memory://globbed") == "01"
    with pytest.raises(DataError, match=r"names the same files more than once: .*b/2.csv"):
        open_rows(["b/*", "./b/2.csv"])
    with pytest.raises(DataError, match=r"no file matches 'b/\*.json'. Files there: 1.parquet, 10.jsonl, 2.csv"):
        open_rows("b/*.json")
    with pytest.raises(DataError, match=r"there is nothing at 'memory://globbed/x.jsonl'"):
        open_rows("memory://globbed/x.jsonl")


def test_a_folder_has_the_parts_that_its_files_name(tmp_path):
    for name in ("data/train-00001.jsonl", "data/train-00000.jsonl", "dev/a.jsonl", "test_contest.jsonl", ".x.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl_of([{"text": name}]))
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "README.md").write_text("# Rows")
    found = {
        split: [row["text"] for row in all_of(open_rows(str(tmp_path), split=split))] for split in ("train", "test")
    }
    assert found == {"train": ["data/train-00000.jsonl", "data/train-00001.jsonl"], "test": ["test_contest.jsonl"]}
    assert len(open_rows(str(tmp_path), split="validation")) == 1
    with pytest.raises(DataError, match=r"no split 'tests'; it has test, train, validation. Did you mean 'test'"):
        open_rows(str(tmp_path), split="tests")


def test_a_file_of_a_folder_without_rows_is_named_with_a_way_out(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl_of(ROWS))
    (tmp_path / "settings.json").write_text('{"version": 1}')
    with pytest.raises(
        DataError, match=r"settings.json' is one JSON object.*name the files that do, as in folder/\*.jsonl"
    ):
        open_rows(str(tmp_path))
    assert all_of(open_rows(f"{tmp_path}/*.jsonl")) == ROWS


def test_a_folder_whose_readme_names_its_sets_is_read_as_on_the_hub(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    for name in ("one", "two"):
        (tmp_path / "set" / f"{name}.jsonl").write_bytes(jsonl_of([{"text": name}]))
    head = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: two.jsonl\n---\n"
    (tmp_path / "set" / "README.md").write_text(head)
    assert all_of(open_rows(str(tmp_path / "set"))) == [{"text": "two"}]


BROKEN = {
    "empty.jsonl": (b"", "is empty: it has 0 bytes"),
    "empty.csv": (b"", "is empty"),
    "cut.jsonl.gz": (KINDS["a.jsonl.gz"][:-12], "cut short: its gzip data have no end"),
    "sum.jsonl.gz": (KINDS["a.jsonl.gz"][:-8] + b"12345678", r"gzip data are damaged.*CRC"),
    "bytes.jsonl.gz": (KINDS["a.jsonl.gz"][:20] + b"\xff" * 9 + KINDS["a.jsonl.gz"][29:], "gzip data are damaged"),
    "cut.jsonl.bz2": (KINDS["a.jsonl.bz2"][:-5], "cut short: its bz2 data"),
    "cut.jsonl.xz": (KINDS["a.jsonl.xz"][:-5], "cut short: its xz data"),
    "cut.jsonl.zst": (KINDS["a.jsonl.zst"][:-5], "cut short: its zstd data"),
    "plain.jsonl.gz": (KINDS["a.jsonl"], "ending says that it is gzip data, but its first bytes are not of that"),
    "packed.jsonl": (
        KINDS["a.jsonl.gz"],
        r"uncompressed jsonl file, but .* those of gzip data. Rename it so that it ends",
    ),
    "page.parquet": (b"<!DOCTYPE html><html>", "ending says that it is a parquet file, but its first bytes are not"),
    "csv.parquet": (KINDS["a.csv"], "but its first bytes are not of one"),
    "arrow.jsonl": (KINDS["file.arrow"], "those of a arrow file. Rename it so that it ends in .arrow"),
    "cut.parquet": (KINDS["a.parquet"][:-9], r"cannot read '.*cut.parquet'.*if it is damaged or cut short"),
    "cut.arrow": (KINDS["file.arrow"][:300], r"cannot read '.*cut.arrow'.*if it is damaged or cut short"),
    "a.parquet.gz": (gzip.compress(KINDS["a.parquet"]), "decompress it first"),
    "sheet.csv": (b"PK\x03\x04" + bytes(30), "it is a zip file. Unpack it first; the sheets of an .xlsx"),
    "utf16.jsonl": ("\ufeff".encode("utf-16-le") + b"{\x00}\x00", "is UTF-16 text, as `>` in Windows PowerShell"),
    "utf16le.csv": ("a,b\r\n1,2".encode("utf-16-le"), "is UTF-16LE text"),
    "utf16be.json": ("[{}]".encode("utf-16-be"), "is UTF-16BE text"),
    "utf32.jsonl": ("{}".encode("utf-32"), "is UTF-32 text"),
    "array.jsonl": (b'[{"text": "a"}]', "begins with '\\[': rename it to .json"),
    "plain": (b"Once upon a time", r"cannot tell what .*plain text ends in .txt"),
    "cut.json": (b'[{"a": 1},\n {"a": 2}', "line 2 has the end of the file where .* cut short"),
    "cut2.json": (b'[{"a": 1},\n {"a": ', "not valid JSON.*line 2"),
    "number.json": (b"7", "no array of rows"),
    "doubles.parquet": (
        columns_of(ROWS, lambda table, sink: parquet.write_table(table.rename_columns(["a", "a"]), sink)),
        "several columns of the name a",
    ),
    "objects.json": (b'{"a": \n1}\n{"a": \n', "objects.json' is not valid JSON"),
    "quote.csv": (b'a,b\n"1,2\n', "quote.csv line 2 is not CSV"),
    "names.csv": (b"a,b,a\n1,2,3\n", "several columns of the name a"),
    "latin.csv": ("a\ncafé\n".encode("latin-1"), "latin.csv line 2 is not UTF-8 text: byte 0xe9, in 'café"),
    "latin.json": ('[\n"café"]'.encode("latin-1"), r"0xe9.*Write it anew: iconv -f WINDOWS-1252"),
    "deep.json": (b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_refused_with_its_file(tmp_path, name):
    raw, message = BROKEN[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=message) as refused:
        open_rows(str(tmp_path / name))
    assert name in str(refused.value)


def test_rows_of_csv_with_other_numbers_of_cells_are_named_one_by_one(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,2\n1,2,3\n4,5\n6\n")
    rows = open_rows(str(tmp_path / "a.csv"))
    assert (rows[0], rows[2]) == ({"a": "1", "b": "2"}, {"a": "4", "b": "5"})
    for index, (line, cells) in {1: (3, 3), 3: (5, 1)}.items():
        with pytest.raises(DataError, match=rf"a.csv line {line} has {cells} cells, but there are 2 columns \(a, b\)"):
            rows[index]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"café"'.encode("latin-1"), r"a.jsonl line 2 is not UTF-8 text: byte 0xe9.*WINDOWS-1252 -t UTF-8 a.jsonl"),
        (b"[" * 100_000, "a.jsonl line 2 is not JSON: it is nested deeper than"),
        (b"9" * 5_000, "a.jsonl line 2 is not JSON"),
        (b'{"a": "\x00"}', "a.jsonl line 2 is not JSON"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "a.jsonl line 2 is not JSON: the name 'c' is there twice"),
        (b"{", "a.jsonl line 2 is not JSON: Expecting .* at column 2. .* objects span lines must end in .json"),
    ],
    ids=["latin", "deep", "digits", "control", "double", "pretty"],
)  # fmt: skip
def test_a_broken_line_is_named_when_it_is_read(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + line + b"\n{}")
    rows = open_rows(str(tmp_path / "a.jsonl"))
    assert rows[0] == rows[2] == {}
    with pytest.raises(DataError, match=message):
        rows[1]


@pytest.mark.skipif(shutil.which("iconv") is None, reason="no iconv here")
def test_the_command_that_mends_an_encoding_mends_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}'.encode("utf-16"))
    with pytest.raises(DataError, match="iconv") as refused:
        open_rows(str(tmp_path / "a.jsonl"))
    command = str(refused.value).partition("Write it anew: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert all_of(open_rows(str(tmp_path / "utf8-a.jsonl"))) == [{"text": "é"}]


def test_damage_within_a_parquet_file_names_the_row(tmp_path):
    raw = columns_of(
        [{"text": "x" * 50 + str(i)} for i in range(9)], lambda t, s: parquet.write_table(t, s, row_group_size=4)
    )
    damaged = bytearray(raw)
    damaged[4:300] = bytes(np.random.default_rng(0).integers(0, 256, 296, np.uint8))
    (tmp_path / "a.parquet").write_bytes(damaged)
    rows = open_rows(str(tmp_path / "a.parquet"))
    with pytest.raises(DataError, match=r"row 1 of a.parquet: cannot read '.*a.parquet'"):
        rows[1]


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' * 9)
    rows = open_rows(str(path))
    path.write_bytes(b'{"text": "longer"}\n' * 9)
    rows._text._block = (0, b"")
    with pytest.raises(DataError, match=r"a.jsonl' changed while it was read"):
        rows[3]


def test_names_that_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_bytes(KINDS["a.csv"])
    with pytest.raises(DataError, match=r"write hf://HuggingFaceH4/ultrachat_200k"):
        open_rows("HuggingFaceH4/ultrachat_200k")
    with pytest.raises(DataError, match=r"Did you mean 'rows.csv'\?"):
        open_rows("rows.cvs")
    with pytest.raises(DataError, match=r"the list is empty"):
        open_rows("[]")
    (tmp_path / "rows.csv").unlink()
    (tmp_path / "rows.csv").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"no data file 'rows.csv'. Files there: rows.csv"):
        open_rows("rows.csv")


def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match=r"pipe.jsonl' is a pipe or a device.*write them to a file first"):
        open_rows(str(tmp_path / "pipe.jsonl"))


def test_a_query_in_an_address_is_no_pattern():
    assert not is_pattern("https://example.org/a.jsonl.gz?download=true")
    assert kind_by_name("https://example.org/a.JSONL.gz?download=true") == FileKind("jsonl", "gzip")
    assert is_pattern("gs://bucket/?.jsonl") and is_pattern("a?.jsonl") and not is_pattern("hf://owner/name")


def test_what_datasets_says_behind_its_error_is_told(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*_):
        try:
            raise KeyError("one file has the columns a, the other b")
        except KeyError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"An error occurred; because: .*the columns a, the other b"):
        open_rows("hf://owner/name")


@pytest.mark.parametrize("method", ["open", "isdir", "glob", "find"])
def test_errors_of_stores_are_explained_whatever_library_raises_them(monkeypatch, method):
    class Refused(Exception):
        pass

    def fail(*_, **__):
        raise Refused("no permission for bucket")

    files = fsspec.filesystem("memory")
    files.pipe_file("/refused/a.jsonl", b"{}")
    monkeypatch.setattr(type(files), method, fail)
    path = {"glob": "memory://refused/*", "find": "memory://refused"}.get(method, "memory://refused/a.jsonl")
    with pytest.raises(DataError, match=r"cannot read 'memory://refused.*': no permission for bucket"):
        open_rows(path)


def test_columns_that_need_another_library_name_it():
    class Sounds:
        cache_files = ()

        def __getitem__(self, index):
            raise ImportError("To support decoding audio data, please install 'torchcodec'.")

    with pytest.raises(DataError, match=r"row 3 of set .* a column that is no text: .*torchcodec.*remove_columns"):
        TableRows(Sounds(), "set", "train", [])[3]


def test_text_files_are_rows_as_datasets_reads_them(tmp_path):
    """The oracle is the `text` builder of datasets, which keeps empty lines and the end of a document."""
    raw = "\nOne line.\nTwo, é 漢.\n\n\nA paragraph\nof two lines.\n"
    (tmp_path / "a.txt").write_text(raw, encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(raw.replace("\n", "\r\n").encode()))
    for kind in ("document", "paragraph", "line"):
        oracle = datasets.load_dataset("text", data_files=str(tmp_path / "a.txt"), split="train", sample_by=kind)
        expected = [text for row in oracle if (text := row["text"].strip("\n"))]
        for name in ("a.txt", "b.txt.gz"):
            assert [row["text"] for row in all_of(open_rows(str(tmp_path / name), sample_by=kind))] == expected
    assert len(open_rows(str(tmp_path / "*.txt*"))) == 2
    assert open_rows(str(tmp_path / "a.txt"), sample_by="line").where(2) == "a.txt line 6"


def test_text_files_of_a_folder(tmp_path):
    for name in ("the test of time.txt", "dev-notes.md", "test.txt", "README.md", "LICENSE.txt"):
        (tmp_path / name).write_text(name)
    assert [row["text"] for row in all_of(open_rows(str(tmp_path)))] == ["dev-notes.md", "the test of time.txt"]
    assert [row["text"] for row in all_of(open_rows(str(tmp_path), split="test"))] == ["test.txt"]
    (tmp_path / "rows.jsonl").write_text('{"text": "row"}')
    assert [row["text"] for row in all_of(open_rows(str(tmp_path)))] == ["row"], "notes beside rows are no rows"
    (tmp_path / "objects.txt").write_text('\n{"text": "a"}\n{"text": "b"}\n')
    assert len(open_rows(str(tmp_path / "objects.txt"))) == 2, "JSON under the name of a text"


@pytest.mark.parametrize("name", ["a\0.jsonl", "~\0", "~\ud83d", "a\ud83d.jsonl", "*/" + "a" * 5000 + "/*", "a" * 5000])
def test_names_that_no_file_can_have(name):
    with pytest.raises(DataError, match=r"no (data )?file|There is no folder"):
        open_rows(name)


def test_what_cannot_be_looked_into_is_told(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.jsonl").write_text("{}")
    monkeypatch.setattr(type(tmp_path), "is_file", refuse)  # root may look into everything
    with pytest.raises(DataError, match=r"cannot read '.*a\.jsonl': Permission denied"):
        open_rows(str(tmp_path))


def test_a_damaged_arrow_file_points_nowhere(tmp_path):
    table = pa.Table.from_pylist([{"text": "abcdef"}, {"text": "ghi"}])
    raw = bytearray(columns_of(table.to_pylist(), arrow_of(pa.ipc.new_file)))
    at = bytes(raw).index((6).to_bytes(4, "little") + (9).to_bytes(4, "little"))  # offsets of the two texts
    for wrong in (2**31 - 1, -7):
        raw[at : at + 4] = wrong.to_bytes(4, "little", signed=True)
        (tmp_path / "a.arrow").write_bytes(raw)
        with pytest.raises(DataError, match=r"row 0 of a.arrow: cannot read .*Fetch or write it again"):
            _ = open_rows(str(tmp_path / "a.arrow"))[0]
