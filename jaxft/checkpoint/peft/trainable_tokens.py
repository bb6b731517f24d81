"""TRAINABLE_TOKENS in PEFT's folders: rows of tables that are trained, and nothing else.

The folder names the tokens by `token_indices`, and their tables by `target_modules`; its keys are
`<module>.trainable_tokens_delta` [n, D]. `changed_base` reads the rows, as it does beside LoRA; here are the settings.
"""

# n tokens, D model

from collections.abc import Collection, Iterator, Mapping
from typing import Any, cast

from jaxft.adapters.token_rows import TokenRows
from jaxft.checkpoint.peft.folder import TRAINABLE_TOKENS, MergeBlock, PeftTensor, misfit_error, refuse_unknown
from jaxft.checkpoint.tensors import TensorSource, TensorSpec
from jaxft.errors import ModelError
from jaxft.nn.decoder import Decoder

PEFT_TYPE = TRAINABLE_TOKENS
READ = ("token_indices", "target_modules", "init_weights")


def normalize(
    config: Mapping[str, Any], source: TensorSource, base: Collection[str]
) -> tuple[dict[str, Any], TensorSource]:
    """The settings and tensors as they are. Raises ModelError for settings that are not implemented."""
    refuse_unknown(config, lambda name, value: name in READ)
    return dict(config), source


def attach_to(
    model: Decoder, config: Mapping[str, Any], specs: Mapping[str, TensorSpec], folder: str
) -> tuple[str, ...]:
    """Raises CheckpointError: a folder of this kind has no halves, and is attached as rows of tables."""
    raise misfit_error([f"{key} is no row of a table" for key in specs])


def peft_tensors(model: Decoder) -> Iterator[PeftTensor]:
    """The folder's tensors for a model's adapters; its rows are written with those of all kinds."""
    return iter(())


def adapter_config_fields(model: Decoder) -> dict[str, Any]:
    """The fields of adapter_config.json for a model's rows. Raises ModelError if its tables have other tokens each."""
    by_table = cast(TokenRows, model.token_rows).by_table()
    first, *others = [list(rows.indices) for rows in by_table.values()]
    if any(other != first for other in others):
        raise ModelError(
            "the rows of the embeddings and of the LM head that are trained are those of different tokens, and PEFT "
            "has a form for that only beside LoRA. Write the merged model: jaxft export --format=merged"
        )
    return {"token_indices": first, "target_modules": list(by_table)}


def merge_blocks(base: TensorSource, config: Mapping[str, Any], source: TensorSource) -> dict[str, MergeBlock]:
    """Raises CheckpointError: a folder of this kind has no halves, and its rows are merged with those of all kinds."""
    raise misfit_error([f"{key} is no row of a table" for key in source.specs()])
