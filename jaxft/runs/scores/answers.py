"""`answers.jsonl` in a run folder: the answer to every held-out row, before and after training."""

import dataclasses
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.data import Tokenizer
from jaxft.files.atomic import write_text
from jaxft.files.run_folder import ANSWERS
from jaxft.generation.settings import FinishReason, Sampling
from jaxft.generation.thoughts import parts_of
from jaxft.generation.tokens import OnToken, generate_tokens
from jaxft.nn.decoder import Decoder
from jaxft.sharding.processes import on_primary

WAYS = ("base", "tuned")
ROUNDS = 4  # times the answers that are generated at the same time; after so many they are saved

log = logging.getLogger(__name__)

Save = Callable[[Sequence["AnsweredRow"]], None]


@dataclass(frozen=True, kw_only=True)
class AnsweredRow:
    """A greedy answer. text: without thoughts. prompt_tokens, answer_tokens: their numbers, thoughts among the latter.

    seconds: the wall time of the rows that were answered in one go, divided by their number.
    """

    text: str
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    finish_reason: FinishReason


FIELDS = {
    "text": str, "prompt_tokens": int, "answer_tokens": int, "seconds": int | float, "finish_reason": str,
}  # fmt: skip


def answer_prompts(
    module: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    slots: int,
    kept: Sequence[AnsweredRow] = (),
    save: Save = lambda rows: None,
    between: Callable[[], None] = lambda: None,
    on_token: OnToken | None = None,
) -> list[AnsweredRow]:
    """Greedy answers to prompts, in their order, those of `kept` first.

    save: takes all answers so far, now and then. between: called before every few tokens; it may raise, to stop there.
    on_token: see `generate_tokens`; rows are counted within a part.
    """
    done, slots = list(kept), max(1, min(slots, len(prompts)))
    while len(done) < len(prompts):
        between()
        part = prompts[len(done) : len(done) + ROUNDS * slots]
        began = time.perf_counter()
        generated = generate_tokens(
            module,
            part,
            sampling=Sampling(max_new_tokens=max_new_tokens),
            stop_ids=tokenizer.stop_ids,
            slots=slots,
            on_token=on_token,
            between=between,
        )
        seconds = (time.perf_counter() - began) / len(part)
        done += [
            AnsweredRow(
                text=parts_of(tokenizer, prompt, one.tokens)[1],
                prompt_tokens=len(prompt),
                answer_tokens=len(one.tokens),
                seconds=round(seconds, 6),
                finish_reason=one.finish_reason,
            )
            for prompt, one in zip(part, generated, strict=True)
        ]
        save(done)
    return done


def answers_key(prompts: Sequence[Sequence[int]], max_new_tokens: int, model: Any = None) -> str:
    """A digest of what answers depend on. model: what tells the weights from others of the same run, such as a step."""
    return hashlib.sha256(json.dumps([list(map(list, prompts)), max_new_tokens, model]).encode()).hexdigest()[:16]


class AnswersFile:
    """The file `answers.jsonl` of a run: a JSON object for every way and row, with `key`, of `answers_key`.

    The file is replaced as a whole, so that a kill leaves the old one or the new one. Every process of a run calls the
    methods; process 0 reads and writes.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ANSWERS

    def kept(self, way: str, key: str) -> list[AnsweredRow]:
        """The first answers of a way that have this key, none if there are no such ones or the file is damaged."""
        rows = on_primary(lambda: [one for one in read_answers(self._path) if one["way"] == way and one["key"] == key])
        return [AnsweredRow(**{name: row[name] for name in FIELDS}) for row in rows]

    def write(
        self,
        way: str,
        key: str,
        rows: Sequence[AnsweredRow],
        names: Sequence[str],
        scores: Mapping[str, Sequence[float | bool]] | None = None,
    ) -> None:
        """Replaces the answers of a way. names: of the rows, in errors. scores: by every metric, once they are known.

        A score is true or false by a metric that an answer passes or not, else a number.
        """

        def lines_of() -> None:
            lines = {one: [row for row in read_answers(self._path) if row["way"] == one] for one in WAYS}
            lines[way] = [
                {"way": way, "row": number, "name": names[number], **dataclasses.asdict(row), "key": key}
                | ({} if scores is None else {"scores": {name: given[number] for name, given in scores.items()}})
                for number, row in enumerate(rows)
            ]
            every = [json.dumps(line, ensure_ascii=False) + "\n" for one in WAYS for line in lines[one]]
            write_text(self._path, "".join(every))

        on_primary(lines_of)


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The lines of such a file: none if there is no file and, with a warning, if it is damaged."""
    if not path.is_file():
        return []
    try:
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    except (ValueError, RecursionError) as error:
        log.warning("%s is damaged, so it is left out: %s", path, error)
        return []
    if not all(_is_answer(row, number) for number, row in _numbered(rows)):
        log.warning("%s is damaged: values in it are missing or have wrong types, so it is left out", path)
        return []
    return rows


def _numbered(rows: Sequence[Any]) -> list[tuple[int, Any]]:
    """Each line with its number among those of its way."""
    seen: dict[Any, int] = {}
    out = []
    for row in rows:
        way = str(row.get("way")) if isinstance(row, dict) else ""
        out.append((seen.setdefault(way, 0), row))
        seen[way] += 1
    return out


def _is_answer(row: Any, number: int) -> bool:
    return (
        isinstance(row, dict)
        and row.get("way") in WAYS
        and row.get("row") == number
        and isinstance(row.get("key"), str)
        and all(isinstance(row.get(name), kind) for name, kind in FIELDS.items())
    )
