"""An environment of one's own (docs/rewards.md): the model is told how much too long its answer is until it fits.

Its rows have messages as their `prompt`, and the most words of the answer as `most_words`.
"""


class Shorten:
    """Replies to answers that are too long. The reward is 1 once an answer fits, less a tenth for each further turn."""

    columns = ("most_words",)

    def reset(self, row):
        self.most, self.turns, self.success = int(row["most_words"]), 0, False
        return row["prompt"]

    def step(self, completion):
        self.turns += 1
        words = len(completion.split())
        self.success = 0 < words <= self.most
        if self.success:
            return []
        return [{"role": "user", "content": f"That has {words} words. Answer in 1 to {self.most} words."}]

    def reward(self):
        return max(0.1, 1.1 - 0.1 * self.turns) if self.success else 0.0
