"""Marks on messages that keep an answer from being trained, under the names that files of other trainers use."""

from collections.abc import Mapping
from typing import Any

from jaxft.config import DataConfig
from jaxft.data.rows.values import RowProblem, is_absent, sample

# 1 means that the message is trained. OpenAI: weight; axolotl: train, training; ms-swift and AgentInstruct: loss;
# verl: loss_mask.
TRAINED = (
    "train", "training", "trainable", "trained", "is_trained", "train_on", "weight", "loss", "loss_weight",
    "loss_mask", "loss_scale", "compute_loss", "use_loss", "has_loss", "learn",
)  # fmt: skip
# 1 means that the message is not trained. torchtune: masked.
UNTRAINED = (
    "masked", "is_masked", "loss_masked", "ignore", "ignore_loss", "no_loss", "skip_loss", "no_train", "not_trained",
    "untrained", "exclude_from_loss",
)  # fmt: skip
# Marks of spans of characters (axolotl).
SPANS = ("train_detail", "training_detail", "trainable_detail", "loss_detail")
# 1 means either, depending on who wrote the file.
AMBIGUOUS = ("mask",)
NAMES = frozenset((*TRAINED, *UNTRAINED, *SPANS, *AMBIGUOUS))
VALUES = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def split_marks(message: Mapping[str, Any], what: str, config: DataConfig) -> tuple[dict[str, Any], bool | None]:
    """(the message without its marks, whether it is to be trained); None if it has no mark.

    message: a message, or a part of its content. what: its name in errors. config: its marks, which name further ones.
    Raises RowProblem for a mark that is neither 0 nor 1, that marks spans, that may mean either, or that contradicts
    another.
    """
    own = config.mark_names
    names = [name for name in message if name in NAMES or name in own]
    if not names:
        return dict(message), None
    bare = {name: value for name, value in message.items() if name not in names}
    verdicts = {
        name: _verdict(name, message[name], what, own.get(name)) for name in names if not is_absent(message[name])
    }
    if len(set(verdicts.values())) > 1:
        marks = " and ".join(f"{name}: {_shown(message[name])}" for name in verdicts)
        raise RowProblem(f"{what} has {marks}, which contradict each other; keep one")
    return bare, next(iter(verdicts.values()), None)


def _verdict(name: str, value: Any, what: str, meaning: str | None) -> bool:
    if name in SPANS and meaning is None:
        raise RowProblem(
            f"{what} has {name}, which marks spans of its characters, but only whole messages can be left out of "
            f"training. Mark the message with train, or train it whole with data.ignored_columns='messages.{name}'"
        )
    if name in AMBIGUOUS and meaning is None:
        raise RowProblem(
            f"{what} has {name}: {_shown(value)}, which means trained in some files and not trained in others. Set "
            f"data.marks to '{name}=untrained' if 1 keeps the message from being trained, else to '{name}=trained'"
        )
    mark = VALUES.get(str(value).lower()) if isinstance(value, bool | int | float | str) else None
    if mark is None:
        raise RowProblem(
            f"{what} has {name}: {_shown(value)}; it may be 0 or 1, or false or true. Other weights are not "
            f"supported: data.ignored_columns='messages.{name}' trains on the message as if it had none"
        )
    trained_by_one = meaning == "trained" if meaning is not None else name in TRAINED
    return mark if trained_by_one else not mark


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else sample(value)


def changes_nothing(name: str, value: Any) -> bool:
    """Whether a mark of a whole row says what is done anyway: that it is trained, with weight 1."""
    mark = VALUES.get(str(value).lower())
    return mark is True if name in TRAINED else mark is False and name in UNTRAINED
