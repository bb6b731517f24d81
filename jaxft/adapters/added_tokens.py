"""Training the rows of tokens that were added to a model, beside its adapters."""

from jaxft.adapters.attach import CarriedParam, SavedParam
from jaxft.adapters.saved import mark
from jaxft.adapters.token_rows import attach_token_rows
from jaxft.data.tokenizers.table import AddedRows
from jaxft.errors import ConfigError
from jaxft.nn.decoder import Decoder

PARAMETERS = {"embed_tokens": "embedding", "lm_head": "kernel"}


def train_added_tokens(model: Decoder, added: AddedRows) -> None:
    """Makes the rows of added tokens trainable in every table of a model whose other weights are frozen.

    A table that `modules_to_save` trains whole stays as it is. If the tables grew, the folder of the adapter gets them
    too, because its base does not have their new rows. Raises ModelError for a table that has an adapter.
    """
    tables = ["embed_tokens"] + (["lm_head"] if model.lm_head is not None else [])
    frozen = [name for name in tables if not isinstance(getattr(getattr(model, name), PARAMETERS[name]), SavedParam)]
    attach_token_rows(model, dict.fromkeys(frozen, added.tokens))
    if added.grows:
        mark(model, {f"{name}/{PARAMETERS[name]}": CarriedParam for name in frozen})


def check_added_tokens(model: Decoder, patterns: str | None) -> None:
    """Raises ConfigError if `model.trainable` leaves a table with added tokens untrained."""
    if model.trainable_paths is None:
        return
    tables = ["embed_tokens"] + (["lm_head"] if model.lm_head is not None else [])
    missing = [name for name in tables if f"{name}/{PARAMETERS[name]}" not in model.trainable_paths]
    if missing:
        raise ConfigError(
            f"model.trainable={patterns!r} does not train {' and '.join(missing)}, so that the rows of "
            f"model.add_tokens would stay as they were drawn: add {','.join(missing)} to it"
        )
