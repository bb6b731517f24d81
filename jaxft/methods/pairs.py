"""What methods that train on pairs of answers share: the settings under which rows are pairs."""

import jax

from jaxft.config import RunConfig
from jaxft.data.batch import Batch
from jaxft.data.examine_pairs import MARGIN
from jaxft.errors import ConfigError
from jaxft.methods import sequences


def batch_shapes(config: RunConfig) -> Batch[jax.ShapeDtypeStruct]:
    """The shapes of a batch of pairs, whose documents carry the margin of their pair."""
    return sequences.batch_shapes(config, values=(MARGIN,))


def check_pairs(config: RunConfig) -> None:
    """Raises ConfigError for settings of data that would cut a pair or read rows that are none."""
    data, method = config.data, f"method.name={config.method.name!r}"
    if data.truncation == "right":
        raise ConfigError(
            "data.truncation='right' would cut the rejected answer of a pair and leave the chosen one whole. Use "
            "'drop' or 'refuse', or raise data.max_length: it must hold both answers, each with its prompt."
        )
    formats = {f"data.mixture.{name}.format": one.format for name, one in data.mixture.items()}
    for field, value in {"data.format": data.format, **formats}.items():
        if value not in ("auto", None):
            raise ConfigError(
                f"{field}={value!r} has one answer in a row, but {method} reads rows of prompt, chosen and "
                "rejected. Leave it out."
            )
    if data.train_on == "all":
        raise ConfigError(
            "data.train_on='all' trains prompts too, which are the same in both answers of a pair. Use 'assistant'."
        )
