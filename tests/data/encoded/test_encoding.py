"""Rows encoded by any number of processes, and kept on disk, against the same rows encoded one after another."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

import jaxft.data.encoded.cache as cache
import jaxft.data.encoded.encoding as encoding
import jaxft.data.encoded.pool as pool
import jaxft.data.encoded.progress as progress
from jaxft import cli
from jaxft.cli.streams import PROGRESS
from jaxft.config import AdapterConfig, DataConfig, RunConfig
from jaxft.data import prepare
from jaxft.data.chat.encode import encode_all
from jaxft.data.encoded.encoding import encode_set
from jaxft.data.encoded.table import facts_of
from jaxft.data.encoded.work import ReadCounts, Work
from jaxft.data.formats import conversation_of, conversations
from jaxft.data.preferences.pairs import prepare_pairs, read_pairs
from jaxft.data.sources import Listed, Subset, open_rows
from jaxft.errors import DataError


def _rows(count=50, seed=0):
    draw = np.random.default_rng(seed)
    words = ["what", "is", "naïve", "漢字", "two\n", "plus", "<b>", "how", "are", "you"]

    def text():
        return " ".join(draw.choice(words, int(draw.integers(2, 9)))).strip()

    for number in range(count):
        turns = [("user", text()), ("assistant", text())] * (1 + number % 3)
        system = [{"role": "system", "content": "Be brief."}] if number % 4 == 0 else []
        yield {"messages": [*system, *({"role": role, "content": content} for role, content in turns)]}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(encoding, "PART_ROWS", 8)
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "user"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows()), encoding="utf-8")
    return str(path)


def _files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _plain(examples):
    return [(e.tokens.tolist(), e.mask.tolist(), e.row, e.part, dict(e.values)) for e in examples]


def _one_by_one(path, tokenizer):
    counts = ReadCounts()
    return _plain(encode_all(conversations(open_rows(path), DataConfig()), tokenizer, DataConfig(), counts.notes))


def test_any_number_of_processes_writes_the_same_bytes(path, tokenizer_of, tmp_path):
    tokenizer, made = tokenizer_of("llama3"), {}
    for count in (1, 3):
        config = DataConfig(num_proc=count, cache=str(tmp_path / str(count)))
        table, counts = encode_set(open_rows(path), config, tokenizer, conversation_of)
        assert _plain(table) == _one_by_one(path, tokenizer)
        assert counts.formats == {"messages": 50} and counts.holds["a system message"] == 13
        made[count] = _files(tmp_path / str(count)), counts.to_dict()
    assert made[1] == made[3] and len(made[1][0]) == 7 + 2  # parts, manifest, lock
    # Without a cache, the same from memory.
    table, counts = encode_set(open_rows(path), DataConfig(num_proc=1, cache="none"), tokenizer, conversation_of)
    assert (_plain(table), counts.to_dict()) == (_one_by_one(path, tokenizer), made[1][1])


def test_rows_that_only_this_process_can_read_are_sent_to_the_others(path, tokenizer_of):
    class Held(Subset):
        """Rows with what cannot be sent, such as a lock."""

        lock = threading.Lock()

        def __reduce__(self):
            return type(self.lock), ()

    rows = Held(open_rows(path), range(50), "all")
    tokenizer = tokenizer_of("chatml")
    assert pool._pickled(Work(rows=rows, config=DataConfig(), tokenizer=tokenizer, read=conversation_of)) is None
    table, _ = encode_set(rows, DataConfig(num_proc=2, cache="none"), tokenizer, conversation_of)
    assert _plain(table) == _one_by_one(path, tokenizer)
    listed = Listed.of(rows, 10, 20)
    assert [listed[n] for n in range(10)] == [rows[n] for n in range(10, 20)] and listed.where(3) == rows.where(13)


def test_bad_rows_and_unread_columns_are_those_of_one_process(tokenizer_of, jsonl):
    rows = [row | {"shade": n} for n, row in enumerate(_rows())]
    for bad in (5, 21, 22, 45):
        rows[bad] = {"messages": [{"role": "user", "content": "alone"}]}
    for untrained in (6, 33):
        rows[untrained] = {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
        }
    path, told = jsonl(rows), []
    for count in (1, 2):
        table, counts = encode_set(open_rows(path), DataConfig(num_proc=count), tokenizer_of("chatml"), conversation_of)
        assert (
            sorted({*range(50)} - {*facts_of(table).rows.tolist()}) == sorted(counts.bad.rows) == [5, 6, 21, 22, 33, 45]
        )
        told.append((counts.bad.messages, counts.unread.listed, counts.to_dict()))
    assert told[0] == told[1] and told[0][1][0].rows == 44
    assert "rows.jsonl line 6" in told[0][0][0] and "line 22, " in told[0][0][0]
    for count in (1, 2):
        with pytest.raises(DataError, match=r"6 of 50 rows of .* cannot be trained on:\n  rows.jsonl line 6"):
            prepare(RunConfig(data=DataConfig(train=path, num_proc=count, max_length=500)), tokenizer_of("chatml"))
    config = DataConfig(train=path, num_proc=1, max_length=500, bad_rows="skip", ignored_columns="shade")
    assert prepare(RunConfig(data=config), tokenizer_of("chatml")).examination.skipped == 6


def test_a_process_that_is_killed_ends_the_run_with_a_reason(path, tokenizer_of, monkeypatch):
    started = []
    original = pool.Worker.encode

    def encode(self, part, listed):
        if part[0] == 16:
            os.kill(self._process.pid, signal.SIGKILL)
        started.append(self._process)
        return original(self, part, listed)

    monkeypatch.setattr(pool.Worker, "encode", encode)
    with pytest.raises(DataError, match=r"tokenised rows 16 to 23 died \(exit status -9\).*Set data.num_proc"):
        encode_set(open_rows(path), DataConfig(num_proc=2, cache="none"), tokenizer_of("chatml"), conversation_of)
    assert all(process.poll() is not None for process in started)


def test_functions_without_a_name_are_called_in_this_process(path, tokenizer_of):
    def read(*row):
        return conversation_of(*row)

    table, _ = encode_set(open_rows(path), DataConfig(num_proc=2, cache="none"), tokenizer_of("chatml"), read)
    assert _plain(table) == _one_by_one(path, tokenizer_of("chatml"))


def _never(*_):
    pytest.fail("rows were encoded again")


def test_what_is_kept_is_not_made_again(path, tokenizer_of, tmp_path, monkeypatch):
    config = DataConfig(num_proc=1, cache=str(tmp_path / "kept"))
    first, counts = encode_set(open_rows(path), config, tokenizer_of("chatml"), conversation_of)
    monkeypatch.setattr(Work, "encode", _never)
    # Wherever the file is, and whatever does not change tokens.
    moved = shutil.copy(path, tmp_path / "moved.jsonl")
    other = dataclasses.replace(config, max_length=77, truncation="drop", packing=False, shuffle=False, num_proc=2)
    for again in (open_rows(path), open_rows(str(moved))):
        table, same = encode_set(again, other, tokenizer_of("chatml"), conversation_of)
        assert _plain(table) == _plain(first) and same.to_dict() == counts.to_dict()


def test_whatever_changes_tokens_has_another_name(path, tokenizer_of, tmp_path, monkeypatch):
    tokenizer = tokenizer_of("chatml")
    rows = open_rows(path)
    work = Work(rows=rows, config=DataConfig(), tokenizer=tokenizer, read=conversation_of)
    more = tmp_path / "more.jsonl"
    more.write_text(open(path).read().replace("naïve", "naive", 1).replace("na\\u00efve", "naive", 1))
    template = tokenizer.chat_template.replace("\n", " ")
    names = [
        cache.key_of(work),
        cache.key_of(dataclasses.replace(work, rows=open_rows(str(more)))),
        cache.key_of(dataclasses.replace(work, rows=Subset(rows, range(40), "first"))),
        cache.key_of(dataclasses.replace(work, rows=Subset(rows, [*range(20), 21, *range(21, 40)], "others"))),
        cache.key_of(dataclasses.replace(work, config=DataConfig(train_on="last"))),
        cache.key_of(dataclasses.replace(work, config=DataConfig(turns="split"))),
        cache.key_of(dataclasses.replace(work, config=DataConfig(omissions="warn"))),
        cache.key_of(dataclasses.replace(work, tokenizer=tokenizer_of("llama3"))),
        cache.key_of(dataclasses.replace(work, tokenizer=tokenizer_of("chatml", template))),
        cache.key_of(dataclasses.replace(work, read=read_pairs)),
    ]
    monkeypatch.setattr(cache, "_code_digest", lambda: "another version of jaxft")
    names.append(cache.key_of(work))
    assert len(set(names)) == len(names)
    tokenizer.render([{"role": "user", "content": "a"}])  # what a tokenizer finds out meanwhile does not matter
    assert cache.key_of(work) == names[-1]
    # Every field of the config is in the name, or is known to have no effect.
    assert cache.WITHOUT_EFFECT <= {field.name for field in dataclasses.fields(DataConfig)}


def test_the_name_is_the_same_in_every_process(path, tokenizer_of, tmp_path):
    import pickle

    work = Work(rows=open_rows(path), config=DataConfig(), tokenizer=tokenizer_of("chatml"), read=conversation_of)
    (tmp_path / "work").write_bytes(pickle.dumps(work))
    code = "import pickle, sys\nfrom jaxft.data.encoded.cache import key_of as name\n"
    code += "print(name(pickle.load(open(sys.argv[1], 'rb'))))"
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "work")], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == cache.key_of(work)


def _truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def _flip(file):
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rows-00002.arrow", _truncate),
        ("rows-00002.arrow", _flip),
        ("rows-00000.arrow", os.unlink),
        ("manifest.json", _truncate),
        ("manifest.json", os.unlink),
        ("manifest.json", lambda file: file.write_text("[]")),
    ],
)
def test_damaged_files_are_made_anew_with_a_word(name, damage, path, tokenizer_of, tmp_path, caplog):
    config = DataConfig(num_proc=1, cache=str(tmp_path / "kept"))
    encode_set(open_rows(path), config, tokenizer_of("chatml"), conversation_of)
    whole = _files(tmp_path / "kept")
    (file,) = (tmp_path / "kept").rglob(name)
    damage(file)
    table, _ = encode_set(open_rows(path), config, tokenizer_of("chatml"), conversation_of)
    assert "are damaged" in caplog.text and _plain(table) == _one_by_one(path, tokenizer_of("chatml"))
    assert _files(tmp_path / "kept") == whole


def test_a_run_that_was_killed_leaves_nothing_that_is_read(path, tokenizer_of, tmp_path, monkeypatch):
    config = DataConfig(num_proc=1, cache=str(tmp_path / "kept"))
    with monkeypatch.context() as patch:
        patch.setattr(cache.shutil, "rmtree", lambda *_, **__: None)  # as after a kill
        patch.setattr(cache, "_sync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            encode_set(open_rows(path), config, tokenizer_of("chatml"), conversation_of)
    assert not [name for name in (tmp_path / "kept").iterdir() if name.is_dir() and cache.UNFINISHED not in name.name]
    (left,) = (name for name in (tmp_path / "kept").iterdir() if name.is_dir())
    of_another = left.rename(f"{str(left).rpartition('-')[0]}-{os.getppid()}")
    shutil.copytree(of_another, f"{str(left).rpartition('-')[0]}-4194999")  # no process has so high a number
    table, _ = encode_set(open_rows(path), config, tokenizer_of("chatml"), conversation_of)
    assert _plain(table) == _one_by_one(path, tokenizer_of("chatml"))
    assert sorted(name for name in (tmp_path / "kept").iterdir() if cache.UNFINISHED in name.name) == [of_another]


def test_a_folder_that_others_wrote_is_read(path, tokenizer_of, tmp_path, monkeypatch):
    config = DataConfig(num_proc=1, cache=str(tmp_path / "kept"))
    encode_set(open_rows(path), config, tokenizer_of("chatml"), conversation_of)

    def read_only(self):
        pytest.fail("a file was written")

    monkeypatch.setattr(cache.Entry, "lock", read_only)
    table, _ = encode_set(open_rows(path), config, tokenizer_of("chatml"), conversation_of)
    assert _plain(table) == _one_by_one(path, tokenizer_of("chatml"))


@pytest.mark.parametrize("locks", [True, False])
def test_two_runs_may_make_the_same_rows_at_once(locks, path, tokenizer_of, tmp_path, monkeypatch):
    def no_lock(*_):
        raise OSError("no locks here")

    if not locks:
        monkeypatch.setattr(cache.fcntl, "flock", no_lock)
        # Two threads of one process are two runs here, with folders of their own.
        monkeypatch.setattr(cache.os, "getpid", threading.get_ident)
        monkeypatch.setattr(cache, "_is_alive", lambda _: True)
    config = DataConfig(num_proc=1, cache=str(tmp_path / "kept"))
    made, both = [], threading.Barrier(2)

    def run():
        both.wait()
        made.append(encode_set(open_rows(path), config, tokenizer_of("chatml"), conversation_of))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [_plain(table) for table, _ in made] == [_one_by_one(path, tokenizer_of("chatml"))] * 2
    assert len([name for name in (tmp_path / "kept").iterdir() if name.is_dir()]) == 1


def test_few_rows_are_kept_in_a_named_folder_alone(path, tokenizer_of, tmp_path, monkeypatch):
    encode_set(open_rows(path), DataConfig(), tokenizer_of("chatml"), conversation_of)
    assert not (tmp_path / "user").exists()
    monkeypatch.setattr(encoding, "FEW_ROWS", 40)
    encode_set(open_rows(path), DataConfig(num_proc=1), tokenizer_of("chatml"), conversation_of)
    assert list((tmp_path / "user" / "rows").rglob("manifest.json"))
    encode_set(open_rows(path), DataConfig(num_proc=1, cache="none"), tokenizer_of("llama3"), conversation_of)
    assert len(list((tmp_path / "user" / "rows").rglob("manifest.json"))) == 1


def test_a_cache_that_cannot_be_written(path, tokenizer_of, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(encoding, "FEW_ROWS", 40)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "file"))
    table, _ = encode_set(open_rows(path), DataConfig(num_proc=1), tokenizer_of("chatml"), conversation_of)
    assert len(table) == 50 and "kept in memory" in caplog.text
    with pytest.raises(DataError, match=r"cannot be kept: cannot write .*file.*Set data.cache to a folder with room"):
        config = DataConfig(num_proc=1, cache=str(tmp_path / "file" / "below"))
        encode_set(open_rows(path), config, tokenizer_of("chatml"), conversation_of)
    with pytest.raises(DataError, match="is not on a file system, so encoded rows cannot be mapped"):
        encode_set(open_rows(path), DataConfig(cache="gs://bucket/x"), tokenizer_of("chatml"), conversation_of)


def test_old_entries_are_removed_and_the_newest_stay(tmp_path, monkeypatch):
    now = 1_000 * 86400.0
    monkeypatch.setattr(cache.time, "time", lambda: now)
    monkeypatch.setattr(cache, "KEPT_BYTES", 25)
    for name, days, size in (("old", 40, 1), ("a", 3, 10), ("b", 2, 10), ("c", 1, 10), ("x.tmp-host-1", 31, 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_bytes(b"." * size)
        if "tmp" not in name:
            (tmp_path / name / cache.MANIFEST).touch()
            os.utime(tmp_path / name / cache.MANIFEST, (now, now - days * 86400))
        os.utime(tmp_path / name, (now, now - days * 86400))
    cache.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_pairs_and_virtual_tokens_are_the_same_from_the_cache(tmp_path, tokenizer_of, jsonl):
    rows = [{"prompt": f"q {n}", "chosen": " yes" * (1 + n % 3), "rejected": " no", "margin": n} for n in range(30)]
    path = jsonl(rows)

    def make(**data):
        adapter = AdapterConfig(kind="prompt", num_virtual_tokens=3)
        config = RunConfig(data=DataConfig(train=path, num_proc=1, **data), adapter=adapter)
        return prepare_pairs(config, tokenizer_of("plain"))

    plain = make(cache="none")
    for _ in range(2):
        kept = make(cache=str(tmp_path / "kept"))
        assert _plain(kept.train_examples) == _plain(plain.train_examples)
        assert kept.examination == plain.examination


def test_margins_of_some_rows_only_are_refused_across_parts(tokenizer_of, jsonl):
    rows = [{"prompt": f"q {n}", "chosen": " yes", "rejected": " no"} for n in range(30)]
    rows[29]["margin"] = 1.0
    config = RunConfig(data=DataConfig(train=jsonl(rows)))
    with pytest.raises(DataError, match=r"line 30 has a margin, or scores .* and .*line 1 has none"):
        prepare_pairs(config, tokenizer_of("plain"))


def test_a_run_from_the_cache_is_the_run_without(path, tokenizer_of, tmp_path):
    def make(cache):
        config = RunConfig(data=DataConfig(train=path, eval_fraction=0.3, num_proc=1, cache=cache, max_length=200))
        return prepare(config, tokenizer_of("llama3"))

    plain = make("none")
    for _ in range(2):
        kept = make(str(tmp_path / "kept"))
        assert _plain(kept.train_examples) == _plain(plain.train_examples)
        assert _plain(kept.eval_examples) == _plain(plain.eval_examples)
        assert (kept.examination, kept.eval_examination) == (plain.examination, plain.eval_examination)
        assert (kept.eval_prompts, kept.eval_references) == (plain.eval_prompts, plain.eval_references)


def test_rows_are_read_without_jax():
    # A process that tokenises would otherwise wait for it, and take memory for it.
    heavy = ("jax", "flax", "grain", "gguf", "torch")
    code = f"import jaxft.data, jaxft.data.encoded.work, sys; print([n for n in {heavy} if n in sys.modules])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_kept_rows_are_cleared(path, tokenizer_of, tmp_path, capsys):
    folder = tmp_path / "kept"
    encode_set(open_rows(path), DataConfig(num_proc=1, cache=str(folder)), tokenizer_of("chatml"), conversation_of)
    (key,) = (file.parent.name for file in folder.rglob("manifest.json"))
    others = ["notes.txt", f"{key}.tmp-other-1/rows", f"{key[:-1]}/rows", "a/b"]
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    dead = folder / f"{key}.tmp-{socket.gethostname()}-999999999"
    dead.mkdir()
    (tmp_path / "bytes").write_bytes(b"".join(_files(folder / key).values()))
    size = (tmp_path / "bytes").stat().st_size
    assert cli.main(["data", "--clear_cache", f"--data.cache={folder}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(folder), "sets": 1, "bytes": size}
    assert sorted(_files(folder)) == sorted(others)
    assert cli.main(["data", "--clear_cache"]) == 0, "of the user, which has none"
    assert "removed the tokenised rows of 0 sets" in capsys.readouterr().out
    assert cli.main(["data", "--clear_cache", "--data.cache=none"]) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_long_work_says_how_far_it_is(processes, path, tokenizer_of, monkeypatch, caplog):
    monkeypatch.setattr(progress, "EVERY", 0.0)
    caplog.set_level("INFO", logger=PROGRESS)
    encode_set(open_rows(path), DataConfig(num_proc=processes), tokenizer_of("chatml"), conversation_of)
    lines = [record.getMessage() for record in caplog.records if record.name == PROGRESS]
    done = [int(line.split(" of ")[0].removeprefix("tokenised ")) for line in lines]
    assert len(done) == 6 and done == sorted(done) and done[-1] < 50, "the last part ends the work"
    assert all(re.search(r"of 50 rows of .*rows.jsonl.*; about \d+:\d\d minutes more", line) for line in lines)
