"""The model section: which pretrained model, and in which number types it computes and is stored."""

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxft.config.adapter import ADAPTERS
from jaxft.config.fields import BY_CONTENT, COMMA_SEPARATED, FREE_TO_CHANGE, PATH, ReadBy, Section

Dtype = Literal["float32", "bfloat16"]

Policy = Literal["none", "full", "attention", "dots", "offload"]
Remat = Literal["none", "full", "attention", "dots", "offload", "auto"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Which pretrained model, and in which number types it computes and is stored."""

    path: Annotated[
        str, BY_CONTENT, PATH, "a Hugging Face or PEFT folder, a GGUF file, a run folder, or `hf://owner/name`"
    ] = ""
    revision: Annotated[str | None, BY_CONTENT, "branch, tag or commit of a `hf://` path"] = None
    allow_unknown: Annotated[
        str | None,
        "fields of config.json, separated by commas, that are ignored although jaxft does not know what they mean",
    ] = None
    base: Annotated[
        str | None, BY_CONTENT, PATH, "of a PEFT folder in `model.path`: where its base is; None: what the folder names"
    ] = None
    adapter: Annotated[
        Literal["continue", "merge"],
        "of a PEFT folder in `model.path`: `continue` trains its adapter on; `merge` merges it into its base, and what "
        "`adapter` describes is trained on that",
    ] = "continue"
    tokenizer: Annotated[
        str | None, BY_CONTENT, PATH, "where the tokenizer is, in the forms of `model.path`; None: in `model.path`"
    ] = None
    add_tokens: Annotated[
        str | None,
        COMMA_SEPARATED,
        ReadBy("adapter.kind", ("none", "lora"), because="PEFT has trained rows of tokens beside LoRA alone."),
        "texts that become tokens, with new rows in the embedding table and the LM head, which are trained",
    ] = None
    random_init: Annotated[
        bool, "take only the shapes from `model.path`, and draw the weights from `seed` instead of loading them"
    ] = False
    dtype: Annotated[Dtype, "number type of activations and matrix products"] = "float32"
    param_dtype: Annotated[Dtype, "number type of frozen parameters; trained ones are always float32"] = "float32"
    quantization: Annotated[
        Literal["nf4", "nf4-dq", "int8", "int4"] | None,
        ReadBy(
            "adapter.kind",
            ADAPTERS,
            because="Quantized weights are frozen, but adapter.kind='none' trains every weight.",
        ),
        "format to which the frozen linear layers under an adapter are quantized while loading (QLoRA)",
    ] = None
    remat: Annotated[
        Remat,
        FREE_TO_CHANGE,
        "what the backward pass recomputes. `none`: nothing; `full`: every layer; `attention`: all but the attention "
        "outputs; `dots`: all but the results of matrix products; `offload`: every layer, whose inputs are kept in "
        "host memory; `auto`: as little as the memory of the devices allows",
    ] = "none"
    trainable: Annotated[
        str | None,
        COMMA_SEPARATED,
        ReadBy(
            "adapter.kind",
            ("none",),
            because="It chooses which parameters of the model are trained, and beside an adapter all are frozen.",
        ),
        "which parameters of the model are trained; None: all",
    ] = None

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The texts in `add_tokens`."""
        return tuple(text.strip() for text in (self.add_tokens or "").split(",") if text.strip())

    @property
    def allowed(self) -> tuple[str, ...]:
        """The names in `allow_unknown`."""
        return tuple(name.strip() for name in (self.allow_unknown or "").split(",") if name.strip())
