"""From a conversation to token ids and the mask of the trained tokens.

How an answer is located: the chat template renders the conversation up to the answer, as a prompt for generation, and
once more with the answer. The prompt's text must be a prefix of the whole text, and the prompt's tokens a prefix of its
tokens (`prompt_ends`); the answer is the rest, up to and including the token that ends the turn. So the model is
trained on exactly the tokens that it continues when it generates, and templates need no generation tags. `turns`
decides which answers share a sequence.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.batch import Example
from jaxft.data.chat.arrange import arrange
from jaxft.data.chat.mends import LEAVE_OUT, Mends, TemplateProblem
from jaxft.data.chat.prompt_ends import PromptEnds
from jaxft.data.chat.reasoning import split_thoughts
from jaxft.data.chat.row_limits import check_length
from jaxft.data.chat.turns import Layout, Turn, layouts, no_end, render, shared_start, trained_answers
from jaxft.data.formats import Conversation
from jaxft.data.rows.bad_rows import OnBadRow, refuse
from jaxft.data.tokenizers.tokenizer import Tokenizer
from jaxft.errors import DataError

# Conversations tokenised in one batch: enough to keep every core busy, few enough to fit in memory.
CHUNK = 512
# Notes of rows that become several sequences: their tokens as one, and as several; and before the name of a built-in
# template with which the first of them is one.
SPLIT_FROM, SPLIT_TO, WHOLE_WITH = "tokens of split rows", "tokens of their sequences", "whole with "
# Tokens before the end of a prompt at which another end is tried.
TRIED = 16


def encode(conversation: Conversation, tokenizer: Tokenizer, config: DataConfig | None = None) -> list[Example]:
    """The sequences of one conversation; see `encode_all`."""
    return list(encode_all([conversation], tokenizer, config))


def encode_all(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    config: DataConfig | None = None,
    notes: Counter[str] | None = None,
    on_bad: OnBadRow = refuse,
) -> Iterator[Example]:
    """Tokens and mask of every conversation, in order: one sequence each, or several if `data.turns` splits it.

    config: its train_on (`assistant`: every assistant turn, or the completion; `last`: only the last assistant turn;
    `all`: every token but the first), turns, merge_turns, reasoning, omissions and boundary. notes: counts the
    conversations that were `split` or changed, and those from which the template omits something. Tokens after the last
    trained one are cut off: they cannot change the loss. A conversation whose answers are all marked as not trained
    gives a mask of zeros. on_bad: takes rows that cannot be encoded, some sequences of which may have been given; by
    default the first of them raises DataError. A row is bad if the answers cannot be located exactly: the template
    writes an answer differently from how it prompts for it, a token straddles the start of an answer, an answer has no
    end token, BOS is doubled, a part of the row is not rendered, the embedding table has no row for a token, or nothing
    is left to train on.
    """
    config = DataConfig() if config is None else config
    notes = Counter() if notes is None else notes
    prompt_ends, mends = PromptEnds(tokenizer), Mends(tokenizer, config, _encode)
    remaining = iter(conversations)
    while chunk := list(islice(remaining, CHUNK)):
        sequences: list[Layout] = []
        given: list[Conversation] = []  # of each of the sequences, as it was read
        for conversation in chunk:
            try:
                of_row = layouts(arrange(conversation, tokenizer, config, notes), tokenizer, config, notes)
                for layout in of_row:
                    check_length(layout, tokenizer, config)
            except (DataError, RecursionError) as error:
                on_bad(conversation.row, conversation.where, _explained(error, conversation, mends))
                continue
            sequences += of_row
            given += [conversation] * len(of_row)
        encoded = list(prompt_ends.encode(sequences))
        _note_splits(given, [len(ids) for ids, _ in encoded], mends, config, notes)
        for layout, (ids, counts), conversation in zip(sequences, encoded, given, strict=True):
            try:
                example = _mark(layout, ids, counts, tokenizer, config)
            except DataError as error:
                on_bad(conversation.row, conversation.where, mends.explained(error, conversation))
            else:
                yield example


def _encode(conversation: Conversation, tokenizer: Tokenizer, config: DataConfig) -> list[Example]:
    """The sequences of one conversation. Raises DataError without looking for what would help."""
    notes: Counter[str] = Counter()
    sequences = layouts(arrange(conversation, tokenizer, config, notes), tokenizer, config, notes)
    encoded = PromptEnds(tokenizer).encode(sequences)
    return [_mark(layout, *one, tokenizer, config) for layout, one in zip(sequences, encoded, strict=True)]


def _note_splits(
    given: Sequence[Conversation], lengths: Sequence[int], mends: Mends, config: DataConfig, notes: Counter[str]
) -> None:
    """Counts the tokens of the rows that became several sequences, and of what they would be as one.

    given: the row of each sequence; lengths: in tokens. The longest sequence of a row has all of its turns.
    """
    if config.turns != "auto":
        return
    for _, group in groupby(zip(given, lengths, strict=True), key=lambda pair: id(pair[0])):
        pairs = list(group)
        if len(pairs) == 1:
            continue
        if not notes[SPLIT_TO] and (name := mends.whole_with(pairs[0][0])):
            notes[f"{WHOLE_WITH}{name}"] = 1
        notes[SPLIT_FROM] += max(length for _, length in pairs)
        notes[SPLIT_TO] += sum(length for _, length in pairs)


def _explained(error: DataError | RecursionError, conversation: Conversation, mends: Mends) -> DataError:
    if isinstance(error, RecursionError):
        return DataError(f"{conversation.where} is nested too deeply to be rendered")
    return mends.explained(error, conversation)


def _mark(
    layout: Layout, ids: Sequence[int], counts: Sequence[int | None], tokenizer: Tokenizer, config: DataConfig
) -> Example:
    """One sequence with its mask. counts: tokens of the prompt of each turn, None where they are not known yet."""
    plain = not layout.conversation.messages
    if plain and config.boundary == "separate" and counts == [None]:
        ids, count = _encode_separately(layout, ids, tokenizer)
        counts = [count]
    starts = [
        _count_prompt(layout, turn, ids, tokenizer) if count is None else count
        for turn, count in zip(layout.turns, counts, strict=True)
    ]
    tokenizer.check_rows(ids, layout.conversation.where)
    return (_mark_plain if plain else _mark_chat)(layout, ids, starts, tokenizer, config.train_on)


def _encode_separately(layout: Layout, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[list[int], int]:
    """(tokens of the prompt and of the completion, each encoded alone; how many are the prompt's).

    ids: of both at once. Raises DataError if they spell another text, as they do if the tokenizer begins every text
    with a space.
    """
    start = len(layout.turns[0].prompt)
    prompt, completion = tokenizer.encode_batch([layout.text[:start], layout.text[start:]])
    separate = [*prompt, *completion]
    if tokenizer.decode(separate, skip_special_tokens=False) != tokenizer.decode(ids, skip_special_tokens=False):
        raise DataError(
            f"{layout.conversation.where}: the prompt and the completion cannot be encoded separately, because this "
            "tokenizer writes white space before every text. Move the end of the prompt to the completion, or set "
            "data.boundary='refuse' to be told where."
        )
    return separate, len(prompt)


def prompt_of(
    conversation: Conversation, tokenizer: Tokenizer, config: DataConfig | None = None
) -> tuple[list[int], str]:
    """The prompt tokens of the last trained answer, and the text of that answer, to score by generation.

    The tokens are exactly the prefix that training conditions on; the text is without thoughts. Raises DataError for
    a `text` row, which has no prompt, and if the last answer is the first message.
    """
    config = dataclasses.replace(config or DataConfig(), train_on="last")
    if not conversation.messages:
        if not conversation.prompt:
            raise DataError(f"{conversation.where}: plain text has no prompt to answer")
        ids = tokenizer.encode(conversation.prompt)
        tokenizer.check_rows(ids, conversation.where)
        return bos_of(tokenizer) + ids, conversation.completion
    conversation = arrange(conversation, tokenizer, config, Counter())
    last = (trained_answers(conversation, "last") or [0])[0]
    if last == 0:
        raise DataError(f"{conversation.where}: the answer is the first message, so it has no prompt")
    prompt = render(conversation, tokenizer, last, add_generation_prompt=True)
    _, reference = split_thoughts(conversation.messages[last]["content"])
    if not reference.strip():  # a tool call is compared with the text that the template writes
        (example,) = encode(conversation, tokenizer, config)
        _, reference = split_thoughts(tokenizer.decode(example.tokens[example.mask == 1]))
    ids = tokenizer.encode(prompt)
    tokenizer.check_rows(ids, conversation.where)
    return ids, reference


def _count_prompt(layout: Layout, turn: Turn, ids: Sequence[int], tokenizer: Tokenizer) -> int:
    """The number of tokens of a prompt, which must be the first ones of its sequence."""
    prompt = tokenizer.encode(turn.prompt)
    if ids[: len(prompt)] != prompt:
        raise _prefix_error(layout.conversation, turn, ids, prompt, tokenizer)
    return len(prompt)


def _mark_chat(
    layout: Layout, ids: Sequence[int], starts: Sequence[int], tokenizer: Tokenizer, train_on: str
) -> Example:
    conversation = layout.conversation
    _refuse_double_bos(conversation, ids, tokenizer)
    mask = np.zeros(len(ids), np.uint8)
    if not layout.turns and train_on != "all":
        return _unchecked(conversation, ids, mask)
    end = 0
    for turn, start in zip(layout.turns, starts, strict=True):
        end = next((i for i in range(start, len(ids)) if ids[i] in tokenizer.stop_ids), -1)
        if end < 0:
            raise no_end(conversation, turn.number, tokenizer)
        mask[start : end + 1] = 1
    if train_on == "all":
        end = max((i for i, token in enumerate(ids) if token in tokenizer.stop_ids), default=0)
        if end == 0:
            raise no_end(conversation, len(conversation.messages), tokenizer)
        mask[1 : end + 1] = 1
    return _example(conversation, ids[: end + 1], mask[: end + 1])


def _mark_plain(
    layout: Layout, ids: Sequence[int], starts: Sequence[int], tokenizer: Tokenizer, train_on: str
) -> Example:
    conversation = layout.conversation
    bos = bos_of(tokenizer)
    if tokenizer.eos_id is None:
        raise DataError(
            f"{conversation.where}: EOS would never be trained, because the tokenizer {tokenizer.name} has none. "
            "Set eos_token in its tokenizer_config.json."
        )
    ended = bool(ids) and ids[-1] in tokenizer.stop_ids
    ids = [*bos, *ids, *([] if ended else [tokenizer.eos_id])]
    _refuse_double_bos(conversation, ids, tokenizer)
    mask = np.ones(len(ids), np.uint8)
    if train_on != "all":
        mask[: len(bos) + starts[0]] = 0
    return _example(conversation, ids, mask)


def _example(conversation: Conversation, ids: Sequence[int], mask: np.ndarray) -> Example:
    mask[:1] = 0
    if not mask.any():
        raise DataError(f"{conversation.where} trains on zero tokens: its answer is empty once it is tokenised")
    return _unchecked(conversation, ids, mask)


def _unchecked(conversation: Conversation, ids: Sequence[int], mask: np.ndarray) -> Example:
    values = {name: (value,) for name, value in conversation.values.items()}
    tokens = np.asarray(ids, np.int32)
    return Example(tokens=tokens, mask=mask, row=conversation.row, part=conversation.part, values=values)


def bos_of(tokenizer: Tokenizer) -> list[int]:
    """The ids that the tokenizer puts before plain text: BOS, or none."""
    return [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []


def _refuse_double_bos(conversation: Conversation, ids: Sequence[int], tokenizer: Tokenizer) -> None:
    if tokenizer.bos_id is None or list(ids[:2]) != [tokenizer.bos_id] * 2:
        return
    bos = tokenizer.token(tokenizer.bos_id)
    cause = (
        f"both the chat template and the first message write {bos!r}; remove it from one of them"
        if conversation.messages
        else f"the tokenizer adds {bos!r} and the row begins with it too; remove it from the row"
    )
    raise DataError(f"{conversation.where}: BOS doubles: {cause}")


def _prefix_error(
    conversation: Conversation, turn: Turn, ids: Sequence[int], prompt: Sequence[int], tokenizer: Tokenizer
) -> DataError:
    at = shared_start(ids, prompt)
    what = (
        f"{conversation.where}: the tokens of the prompt are not a prefix of those of prompt + answer (message "
        f"{turn.number}): token {at} is {_token_at(prompt, at, tokenizer)} in the prompt alone and "
        f"{_token_at(ids, at, tokenizer)} before the answer, so the model would be trained on a prompt that it never "
        "sees."
    )
    if not conversation.messages:
        return DataError(f"{what} {_boundary_mend(turn, ids, at, tokenizer)}")
    mend = f"Set data.chat_template to one whose prompt ends where a token ends; {LEAVE_OUT}."
    return TemplateProblem(what, mend, kind="tokens")


def _boundary_mend(turn: Turn, ids: Sequence[int], at: int, tokenizer: Tokenizer) -> str:
    """How to cut a text in two so that the tokens of the prompt are the first ones of the whole.

    at: the number of first tokens that both have now.
    """
    _, spans = tokenizer.encode_batch_with_spans([turn.upto])[0]
    for count in range(min(at, len(ids) - 1), max(0, at - TRIED), -1):
        start = spans(count)[0]
        if start < len(turn.prompt) and tokenizer.encode(turn.upto[:start]) == list(ids[:count]):
            moved = turn.prompt[start:]
            return (
                f"Move {moved!r} from the end of the prompt to the start of the completion, or set "
                "data.boundary='separate', which encodes each of them alone."
            )
    return "Set data.boundary='separate', which encodes the prompt and the completion each alone."


def _token_at(ids: Sequence[int], at: int, tokenizer: Tokenizer) -> str:
    return repr(tokenizer.token(ids[at])) if at < len(ids) else "absent"
