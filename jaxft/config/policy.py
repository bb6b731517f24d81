"""The sections of methods that learn from rewards: they sample answers, which are judged while the model trains."""

from dataclasses import dataclass
from typing import Annotated, Literal

from jaxft.config.fields import ABOVE_ZERO, NOT_NEGATIVE, ZERO_TO_ONE, Range, ReadBy
from jaxft.config.method_section import MethodSection
from jaxft.errors import ConfigError

ABOVE_ONE = Range(lambda value: value > 1, "above 1")


@dataclass(frozen=True, kw_only=True)
class OnlineSection(MethodSection):
    """The settings of a method whose rows are prompts, which the model answers while it trains."""

    HELD_OUT_METRICS = ("eval_reward",)
    ROWS = "prompts"


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineSection):
    """Proximal policy optimization: a critic, trained beside the model, says how good each token was."""

    gamma: Annotated[float, ZERO_TO_ONE, "discount of a reward for each token until it comes"] = 1.0
    lam: Annotated[
        float,
        ZERO_TO_ONE,
        "weight of longer estimates of an advantage (arXiv:1506.02438). 1: the rewards that came, less the predicted "
        "value; 0: the next predicted value stands for all later rewards",
    ] = 0.95
    epsilon: Annotated[float, ABOVE_ZERO, "how far from 1 the ratio of the policies of a token is clipped"] = 0.2
    vf_coef: Annotated[float, NOT_NEGATIVE, "factor of the critic's loss"] = 0.1
    cliprange_value: Annotated[
        float | None,
        ABOVE_ZERO,
        "how far a prediction of the critic may move from that of the rollout before its loss is clipped; None: no "
        "limit",
    ] = 0.2
    kl_coef: Annotated[
        float,
        NOT_NEGATIVE,
        "coefficient of the KL divergence from the reference, the model at the start, which is taken from the reward "
        "of each token; 0: no reference",
    ] = 0.05
    kl_estimator: Annotated[
        Literal["k1", "k3"],
        "estimator of the divergence at a token, with r = reference - policy. `k1`: -r; `k3`: exp(r) - r - 1 "
        "(http://joschu.net/blog/kl-approx.html)",
    ] = "k1"
    kl_target: Annotated[
        float | None,
        ABOVE_ZERO,
        "divergence of an answer, in nats, that `kl_coef` is adapted to after each rollout (arXiv:1909.08593, section "
        "2.2); None: `kl_coef` stays as it is",
    ] = None
    kl_horizon: Annotated[
        int,
        ABOVE_ZERO,
        ReadBy("method.ppo.kl_target", because="Otherwise the coefficient is not adapted."),
        "answers in which `kl_coef` changes by its own size, were the error 1; errors count up to 0.2",
    ] = 10_000
    whiten_rewards: Annotated[
        bool, "divide the rewards of tokens by their deviation in the rollout; advantages are always whitened"
    ] = False

    def check(self) -> None:
        if self.kl_target is not None and not self.kl_coef:
            raise ConfigError(
                f"method.ppo.kl_target={self.kl_target} adapts method.ppo.kl_coef by factors, and 0 stays 0: set "
                "kl_coef above 0, or kl_target to None"
            )


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(OnlineSection):
    """REINFORCE leave-one-out: each answer is judged by how its reward exceeds the mean of the others in its group."""

    beta: Annotated[
        float,
        NOT_NEGATIVE,
        "coefficient of the KL divergence from the reference, the model at the start, which is taken from the reward "
        "of each answer; 0: no reference",
    ] = 0.05
    epsilon: Annotated[float, ABOVE_ZERO, "how far below 1 the ratio of the policies of an answer is clipped"] = 0.2
    epsilon_high: Annotated[
        float | None, ABOVE_ZERO, "how far above 1 the ratio is clipped; None: `method.rloo.epsilon`"
    ] = None
    normalize_advantages: Annotated[
        bool, "shift the advantages of a rollout to mean 0 and divide them by their deviation"
    ] = False


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(OnlineSection):
    """Online DPO: of the answers to a prompt, the best is learned as preferred to the worst."""

    beta: Annotated[
        float,
        ABOVE_ZERO,
        "strength of the tie to the reference, the model at the start (arXiv:2402.04792)",
    ] = 0.1
    loss_type: Annotated[Literal["sigmoid", "ipo"], "the loss of a pair; see [preferences](preferences.md#losses)"] = (
        "sigmoid"
    )


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnlineSection):
    """Group relative policy optimization: each answer is judged by how its reward differs from those of its group."""

    loss_type: Annotated[
        Literal["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "luspo"],
        "the loss of a token and what it is divided by. `dapo` and `bnpo`: by the trained tokens of the batch; `grpo`: "
        "by the tokens of its answer, then by the answers; `dr_grpo`: by answers times "
        "`rollout.max_completion_length`; `luspo`: by the answers; `cispo`: as `dapo`, with the clipped ratio as a "
        "constant factor; see [rewards](rewards.md#losses)",
    ] = "dapo"
    importance_sampling_level: Annotated[
        Literal["token", "sequence"],
        "whether the ratio of the policies is that of each token, or one of the whole answer (GSPO, arXiv:2507.18071)",
    ] = "token"
    epsilon: Annotated[float, ABOVE_ZERO, "how far below 1 the ratio of the policies is clipped"] = 0.2
    epsilon_high: Annotated[
        float | None,
        ABOVE_ZERO,
        "how far above 1 the ratio is clipped; DAPO (arXiv:2503.14476) uses 0.28, CISPO 5; None: `epsilon`",
    ] = None
    delta: Annotated[
        float | None,
        ABOVE_ONE,
        "upper limit of the ratio if the advantage is negative (INTELLECT-2, arXiv:2505.07291); None: no limit",
    ] = None
    beta: Annotated[
        float,
        NOT_NEGATIVE,
        "coefficient of the KL divergence from the reference, the model at the start; 0: no reference",
    ] = 0.0
    kl_estimator: Annotated[
        Literal["k3_ratio", "k3"],
        "estimator of the divergence. `k3`: exp(r) - r - 1 with r = reference - policy "
        "(http://joschu.net/blog/kl-approx.html); `k3_ratio`: the same times the ratio of the policies, whose gradient "
        "is that of the divergence",
    ] = "k3_ratio"
    scale_rewards: Annotated[
        Literal["group", "batch", "none"],
        "what the difference to the mean reward of the group is divided by: the deviation of rewards in the `group`, "
        "that in the `batch`, or nothing (`none`, arXiv:2503.20783)",
    ] = "group"
    importance_cap: Annotated[
        float | None,
        ABOVE_ZERO,
        "upper limit of the factor that corrects for tokens whose probability differed when they were sampled "
        "(truncated importance sampling); None: no correction",
    ] = 2.0
    mask_truncated_completions: Annotated[bool, "leave answers out of the loss that were cut off at their length"] = (
        False
    )
    entropy_coef: Annotated[float, NOT_NEGATIVE, "factor of the mean entropy of tokens, which is maximised"] = 0.0

    def check(self) -> None:
        clip = 1 + (self.epsilon_high or self.epsilon)
        if self.delta is not None and self.delta <= clip:
            raise ConfigError(
                f"method.grpo.delta={self.delta} must be above 1 + epsilon_high={clip}: it limits ratios that the clip "
                "lets pass. Raise it, or set it to None."
            )
