"""Charts of a method's own metrics in a run's report."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over the steps of a run. metrics: their names in metrics.jsonl, at most three.

    A metric whose held-out values are logged, under `eval_` and its name, has a second curve of these.
    """

    title: str
    metrics: tuple[str, ...]


# Of methods that compare two answers by their log-probabilities.
PAIR_CHARTS = (
    Chart(title="Rewards of chosen and rejected answers", metrics=("rewards/chosen", "rewards/rejected")),
    Chart(title="Margin between the two rewards", metrics=("rewards/margins",)),
    Chart(title="Share of pairs whose chosen answer has the larger reward", metrics=("rewards/accuracies",)),
    Chart(title="Log-probabilities of chosen and rejected answers, nats", metrics=("logps/chosen", "logps/rejected")),
)
# Of methods on single answers that are labelled good (chosen) or bad (rejected).
LABEL_CHARTS = (
    Chart(title="Rewards of good and bad answers", metrics=("rewards/chosen", "rewards/rejected")),
    Chart(title="Margin between the two rewards", metrics=("rewards/margins",)),
    Chart(title="Log-probabilities of good and bad answers, nats", metrics=("logps/chosen", "logps/rejected")),
    Chart(title="KL divergence from the reference, nats", metrics=("kl",)),
)
# Of reward models.
SCORE_CHARTS = (
    Chart(title="Share of pairs whose chosen answer has the larger score", metrics=("accuracy",)),
    Chart(title="Margin between the two scores", metrics=("margin",)),
    Chart(title="Scores of all answers", metrics=("mean_reward", "min_reward", "max_reward")),
)
# Of distillation.
TEACHER_CHARTS = (
    Chart(title="Divergence from the teacher, nats", metrics=("divergence",)),
    Chart(title="Negative log-likelihood of the data's own tokens, nats", metrics=("nll",)),
    Chart(title="Share of tokens whose likeliest choice is the teacher's", metrics=("teacher_agreement",)),
)
# Of methods that learn from rewards of sampled answers.
REWARD_CHARTS = (
    Chart(title="Reward, and its deviation in a group", metrics=("reward", "reward_std")),
    Chart(title="Share of groups whose rewards are all alike", metrics=("frac_reward_zero_std",)),
    Chart(title="Length of answers, tokens", metrics=("completions/mean_length", "completions/max_length")),
    Chart(title="Share of answers that were cut off", metrics=("completions/clipped_ratio",)),
    Chart(title="Entropy of the policy, nats a token", metrics=("entropy",)),
    Chart(title="KL divergence from the reference, nats a token", metrics=("kl",)),
    Chart(title="Share of tokens whose ratio is clipped", metrics=("clip_ratio/low_mean", "clip_ratio/high_mean")),
    Chart(
        title="Difference between sampler and trainer, nats a token",
        metrics=("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max"),
    ),
    Chart(title="Seconds of a rollout and of its rewards", metrics=("rollout_seconds", "reward_seconds")),
)
# Of PPO.
PPO_CHARTS = (
    REWARD_CHARTS[0],
    Chart(title="Score of answers, and with the divergence", metrics=("objective/scores", "objective/rlhf_reward")),
    *REWARD_CHARTS[2:5],
    Chart(title="KL divergence from the reference, nats an answer", metrics=("objective/kl",)),
    Chart(title="Coefficient of the divergence", metrics=("objective/kl_coef",)),
    Chart(title="Losses of policy and critic", metrics=("loss/policy_avg", "loss/value_avg")),
    Chart(
        title="Share of tokens at which policy or critic are clipped",
        metrics=("policy/clipfrac_avg", "val/clipfrac_avg"),
    ),
    Chart(title="Ratio of the policy to that which sampled", metrics=("val/ratio",)),
    *REWARD_CHARTS[7:],
)
