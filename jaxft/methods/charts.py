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
