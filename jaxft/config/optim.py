"""The optim section: learning-rate schedule, settings that every optimizer has, and one section for each optimizer."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from jaxft.config.fields import (
    ABOVE_ZERO,
    BELOW_ONE,
    BETWEEN_ZERO_AND_ONE,
    CHOOSES_SECTION,
    NOT_NEGATIVE,
    ZERO_TO_ONE,
    Range,
    ReadBy,
    Section,
)
from jaxft.config.model import Dtype
from jaxft.errors import ConfigError

FirstMoment = Annotated[float, BELOW_ONE, "decay rate of the first moment"]
SecondMoment = Annotated[float, BELOW_ONE, "decay rate of the second moment"]
Epsilon = Annotated[float, ABOVE_ZERO, "added to the root of the second moment"]
Momentum = Annotated[float, BELOW_ONE, "decay rate of the momentum"]
MomentsDtype = Annotated[
    Dtype, "number type of the moments; bfloat16, with stochastic rounding, halves the optimizer's memory"
]


@dataclass(frozen=True, kw_only=True)
class AdamW8bitConfig(Section):
    """AdamW with moments in 8 bits."""

    b1: FirstMoment = 0.9
    b2: SecondMoment = 0.999
    eps: Epsilon = 1e-8


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(AdamW8bitConfig):
    """AdamW."""

    moments_dtype: MomentsDtype = "float32"


@dataclass(frozen=True, kw_only=True)
class AdafactorConfig(Section):
    """Adafactor, with a second moment of rows and columns."""

    scale_parameter: Annotated[bool, "multiply each update by the root mean square of its parameter"] = False


@dataclass(frozen=True, kw_only=True)
class LionConfig(Section):
    """Lion, with a single moment."""

    b1: Annotated[float, BELOW_ONE, "weight of the moment in the direction of an update"] = 0.9
    b2: Annotated[float, BELOW_ONE, "decay rate of the moment"] = 0.99
    moments_dtype: MomentsDtype = "float32"


@dataclass(frozen=True, kw_only=True)
class SGDConfig(Section):
    """Stochastic gradient descent with momentum."""

    momentum: Momentum = 0.9
    moments_dtype: MomentsDtype = "float32"


@dataclass(frozen=True, kw_only=True)
class MuonConfig(AdamWConfig):
    """Muon on the matrices of the layers; b1, b2 and eps belong to the AdamW that trains all other parameters."""

    momentum: Momentum = 0.95


@dataclass(frozen=True, kw_only=True)
class ApolloConfig(AdamWConfig):
    """APOLLO: AdamW whose moments are those of a low-rank random projection of each gradient."""

    rank: Annotated[int, ABOVE_ZERO, "rank of the projections"] = 256


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeConfig(AdamW8bitConfig):
    """Schedule-free AdamW, which averages the weights instead of lowering the learning rate."""

    b1: Annotated[
        float,
        Range(lambda value: 0 < value < 1, "above 0 and below 1: 0 leaves no average, and 0.9 to 0.98 is usual"),
        "weight of the average in the parameters at which gradients are taken",
    ] = 0.9


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """The optimizer and its learning-rate schedule. Settings of one optimizer are in the section of its name."""

    name: Annotated[
        Literal["adamw", "adamw_8bit", "adafactor", "lion", "sgd", "muon", "apollo", "schedule_free_adamw"],
        CHOOSES_SECTION,
        "the optimizer; see [optimizers](optimizers.md) for the memory and the usual settings of each",
    ] = "adamw"
    learning_rate: Annotated[float, ABOVE_ZERO, "the peak learning rate, reached at the end of warm-up"] = 2e-4
    schedule: Annotated[Literal["constant", "linear", "cosine"], "course of the learning rate after warm-up"] = "cosine"
    warmup_steps: Annotated[
        int | None, NOT_NEGATIVE, "steps of warm-up; at most one of this and `optim.warmup_ratio` may be set"
    ] = None
    warmup_ratio: Annotated[float | None, BELOW_ONE, "share of the run's steps that are warm-up"] = None
    min_ratio: Annotated[float, ZERO_TO_ONE, "the schedule ends at this share of `optim.learning_rate`"] = 0.0
    weight_decay: Annotated[float, NOT_NEGATIVE, "decay of matrices; norms, biases and other vectors do not decay"] = (
        0.0
    )
    clip_norm: Annotated[
        float | None, ABOVE_ZERO, "largest global norm of the gradient, which is scaled down to it; None: no clipping"
    ] = 1.0
    loraplus_lr_ratio: Annotated[
        float | None,
        ABOVE_ZERO,
        ReadBy(
            "adapter.kind",
            ("lora",),
            because="It scales the learning rate of LoRA's B, which other adapters do not have.",
        ),
        "learning rate of LoRA's B, and of the vectors that are trained with it, divided by that of A (LoRA+, "
        "arXiv:2402.12354)",
    ] = None
    layer_decay: Annotated[
        float | None,
        BETWEEN_ZERO_AND_ONE,
        "learning rate of each layer divided by that of the layer above; the LM head and the last norm have the full "
        "rate, the embeddings the lowest",
    ] = None
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    adamw_8bit: AdamW8bitConfig = field(default_factory=AdamW8bitConfig)
    adafactor: AdafactorConfig = field(default_factory=AdafactorConfig)
    lion: LionConfig = field(default_factory=LionConfig)
    sgd: SGDConfig = field(default_factory=SGDConfig)
    muon: MuonConfig = field(default_factory=MuonConfig)
    apollo: ApolloConfig = field(default_factory=ApolloConfig)
    schedule_free_adamw: ScheduleFreeConfig = field(default_factory=ScheduleFreeConfig)

    @property
    def moments_dtype(self) -> Dtype:
        """Number type of the chosen optimizer's moments; float32 for optimizers that do not let it be chosen."""
        return getattr(getattr(self, self.name), "moments_dtype", "float32")

    def check(self) -> None:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ConfigError(
                f"optim.warmup_steps={self.warmup_steps} and optim.warmup_ratio={self.warmup_ratio} both set the "
                "length of warm-up: set one of them to None"
            )
        if self.name == "schedule_free_adamw" and self.schedule != "constant":
            raise ConfigError(
                f"optim.name='schedule_free_adamw' averages the weights instead of lowering the learning rate, so "
                f"optim.schedule={self.schedule!r} would slow it down twice: set optim.schedule to 'constant'; warm-up "
                "may stay"
            )
