"""What happens to examples that are longer than a training sequence: `data.truncation`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.batch import Example
from jaxft.data.encoded.table import take, with_pieces
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import CheckpointError, DataError, counted
from jaxft.files.hub import hub_path
from jaxft.files.paths import HUB, read_json
from jaxft.home import local_path
from jaxft.nn.virtual import FIRST


@dataclass(frozen=True, kw_only=True)
class ModelLimits:
    """What the model and its tokenizer say about sequences.

    stop_ids: the tokens that end an answer. bos_id: the token that may begin a document; None if there is none. path:
    the model's folder, or its `hf://` name; empty if there is none.
    """

    stop_ids: frozenset[int]
    bos_id: int | None = None
    path: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "ModelLimits":
        """Those of the model that a tokenizer is named after."""
        return cls(stop_ids=tokenizer.stop_ids, bos_id=tokenizer.bos_id, path=tokenizer.name)

    @property
    def positions(self) -> int | None:
        """The longest sequence for which the model was made, by its config.json; None if that cannot be read here."""
        fields = _config_of(self.path)
        nested = fields.get("text_config") or {}
        value = fields.get("max_position_embeddings", nested.get("max_position_embeddings"))
        return value if isinstance(value, int) and value > 0 else None


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Examples of at most `data.max_length` tokens.

    truncated: examples that lost tokens. dropped: examples left out. windowed: examples that were cut into windows, and
    windows: how many these are. headless: examples that begin within an answer, because it is longer than a sequence.
    """

    examples: Sequence[Example]
    truncated: int = 0
    dropped: int = 0
    windowed: int = 0
    windows: int = 0
    headless: int = 0


@dataclass(frozen=True, kw_only=True)
class LengthLimit:
    """The rule for the length of the examples of one set.

    source: the set in errors. where: the name of a row in errors, from its index. pairs: whether each example is a
    chosen and a rejected answer. chats: whether some are rendered by a chat template.
    """

    config: DataConfig
    model: ModelLimits
    source: str
    where: Callable[[int], str]
    pairs: bool = False
    chats: bool = False

    def fit(self, examples: Sequence[Example], lengths: np.ndarray) -> Fitted:
        """The examples within the limit, by `data.truncation`. lengths: theirs, in tokens.

        Raises DataError, naming the longest or the first row, if truncation is `refuse`, if nothing is left, if a cut
        example trains nothing, and for windows over chats.
        """
        over = np.flatnonzero(lengths > self.config.max_length)
        if not len(over):
            return Fitted(examples=examples)
        truncation = self.config.truncation
        if truncation == "refuse":
            raise DataError(self._too_long(examples, lengths, over))
        if truncation == "drop":
            if len(over) == len(examples):
                raise DataError(self._all_too_long(examples, lengths))
            kept = take(examples, np.flatnonzero(lengths <= self.config.max_length))
            return Fitted(examples=kept, dropped=len(over))
        if truncation == "right":
            shorter = self._cut_right([examples[index] for index in over.tolist()])
            return Fitted(examples=with_pieces(examples, over, [[one] for one in shorter]), truncated=len(over))
        if truncation == "left":
            cut = with_pieces(examples, over, [[self._cut_left(examples[index])] for index in over.tolist()])
            headless = sum(self._begins_in_answer(examples[index]) for index in over.tolist())
            return Fitted(examples=cut, truncated=len(over), headless=headless)
        if self.chats:
            raise DataError(
                f"{len(over):,} of {counted(len(examples), 'example')} of {self.source} {_is(over)} longer than "
                f"data.max_length={self.config.max_length}, and some are chats: a window of a chat would train "
                "answers without the questions and the system prompt before them. The longest is "
                f"{self.where(examples[int(np.argmax(lengths))].row)}. Set data.truncation to 'left', which keeps the "
                "last answers; long texts of the same set go into a set of their own in data.mixture."
            )
        pieces = [self._windows(examples[index]) for index in over.tolist()]
        return Fitted(examples=with_pieces(examples, over, pieces), windowed=len(over), windows=sum(map(len, pieces)))

    def _windows(self, example: Example) -> list[Example]:
        max_length, overlap = self.config.max_length, self.config.overlap
        lead = self._lead(example)
        if overlap >= max_length - lead:
            raise DataError(
                f"windows of data.max_length={max_length} begin with {lead} tokens that every document has, and then "
                f"repeat data.window_overlap={overlap}, which leaves no room for new ones: lower it or raise the former"
            )
        return windows_of(example, max_length, overlap, lead)

    def _cut_right(self, examples: Sequence[Example]) -> list[Example]:
        max_length = self.config.max_length
        cut = [_take(example, np.arange(max_length), example.mask[:max_length]) for example in examples]
        empty = [example for example in cut if not example.mask.any()]
        if empty:
            raise DataError(
                f"{counted(len(empty), 'example')} of {self.source} would train on zero tokens, cut to "
                f"data.max_length={max_length}: the first is {self.where(empty[0].row)}, whose prompt alone is that "
                "long. Set data.truncation to 'left', which keeps answers."
            )
        return cut

    def _cut_left(self, example: Example) -> Example:
        return last_tokens_of(example, self.config.max_length, self._lead(example))

    def _begins_in_answer(self, example: Example) -> bool:
        """Whether a cut on the left goes through an answer to a prompt; plain text has no prompt."""
        cut, lead = len(example) - (self.config.max_length - self._lead(example)), max(1, self._lead(example))
        return bool(example.mask[cut] and example.mask[cut - 1] and not example.mask[lead:cut].all())

    def _lead(self, example: Example) -> int:
        """The number of tokens at the start that every document has: virtual tokens and BOS."""
        virtual = int((example.tokens >= FIRST).sum())
        bos = self.model.bos_id is not None and example.tokens[virtual] == self.model.bos_id
        return virtual + int(bos)

    def _too_long(self, examples: Sequence[Example], lengths: np.ndarray, over: np.ndarray) -> str:
        longest = int(np.argmax(lengths))
        return (
            f"{len(over):,} of {counted(len(examples), 'example')} of {self.source} {_is(over)} longer than "
            f"data.max_length={self.config.max_length}; the longest, {self.where(examples[longest].row)}, has "
            f"{lengths[longest]:,} tokens. {self._mend(int(lengths[longest]), examples, over)}"
        )

    def _all_too_long(self, examples: Sequence[Example], lengths: np.ndarray) -> str:
        examples_were = counted(len(lengths), "example", "was", "were")
        return (
            f"{examples_were} longer than data.max_length={self.config.max_length} and dropped, which leaves none of "
            f"{self.source}; the shortest has {lengths.min():,} tokens. "
            f"{self._mend(int(lengths.min()), examples, np.arange(len(examples)))}"
        )

    def _mend(self, length: int, examples: Sequence[Example], over: np.ndarray) -> str:
        return mend_for_length(length, self.model.positions, self._truncations(examples, over))

    def _truncations(self, examples: Sequence[Example], over: np.ndarray) -> list[str]:
        """The values of data.truncation with which these examples can be trained."""
        max_length, some_fit = self.config.max_length, len(over) < len(examples)
        ways = ["drop"] if some_fit else []
        if self.pairs:
            return ways  # a cut pair would lose the rejected answer
        ways += ["left"]
        # If all are cut on the right, none ends in its end token.
        if some_fit and all(examples[index].mask[:max_length].any() for index in over.tolist()):
            ways += ["right"]
        return ways if self.chats else [*ways, "windows"]


def _is(over: np.ndarray) -> str:
    return "is" if len(over) == 1 else "are"


def mend_for_length(length: int, positions: int | None, truncations: Sequence[str]) -> str:
    """What to set so that a sequence of some length fits.

    positions: of the model, beyond which no length is suggested. truncations: values of data.truncation that would do.
    """
    *most, last = [repr(value) for value in truncations] or [""]
    ways = f"data.truncation to {', '.join(most)}{' or ' if most else ''}{last}" if last else ""
    if positions is None or length <= positions:
        return f"Set data.max_length={length}{', or ' if ways else ''}{ways}."
    return f"The model was made for {positions:,} positions, so {f'set {ways}' if ways else 'shorten the rows'}."


def windows_of(example: Example, max_length: int, overlap: int, lead: int = 0) -> list[Example]:
    """Windows over an example, each of at most max_length tokens, that train every trained token exactly once.

    Each begins with the first `lead` tokens of the example, which are not trained again. A window after the first shows
    `overlap` tokens, at least one, before the first token that it trains, and ends with the last one that it trains.
    """
    trained, room = np.flatnonzero(example.mask), max_length - lead
    windows, done = [], 0
    while done < len(trained):
        first = int(trained[done])
        start = lead if first < max_length else first - overlap
        after = int(np.searchsorted(trained, start + room))
        own = trained[done:after]
        indices = np.concatenate([np.arange(lead), np.arange(start, int(own[-1]) + 1)])
        windows.append(_take(example, indices, np.isin(indices, own).astype(example.mask.dtype)))
        done = after
    return windows


def last_tokens_of(example: Example, max_length: int, lead: int = 0) -> Example:
    """The end of an example after its first `lead` tokens, max_length tokens in all.

    The first token of the end is not trained if nothing is before it that could predict it.
    """
    indices = np.concatenate([np.arange(lead), np.arange(len(example) - max_length + lead, len(example))])
    mask = example.mask[indices]
    mask[:1] = 0
    return _take(example, indices, mask)


def _config_of(path: str) -> dict[str, Any]:
    """The content of a model's config.json; empty if there is none that can be read, which is for others to tell."""
    try:
        if path.startswith(HUB):
            from transformers.utils import cached_file

            location = hub_path(path)
            file = None if location.file else cached_file(location.repo, "config.json", revision=location.revision)
            return {} if file is None else read_json(file)
        return read_json(f"{local_path(path).rstrip('/')}/config.json")
    except (OSError, CheckpointError):
        return {}


def _take(example: Example, indices: np.ndarray, mask: np.ndarray) -> Example:
    arrays = {name: array[indices] for name, array in example.arrays.items()}
    return replace(example, tokens=example.tokens[indices], mask=mask, arrays=arrays)
