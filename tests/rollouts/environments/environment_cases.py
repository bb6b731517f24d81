"""Environments of the tests: right ones, and one for each way to fail. Imported in the processes of the pool."""

import os
import random
import time


class Echo:
    """Two replies, then the end; the reward is the number of turns over `points`, and of the same process."""

    columns = ("points",)

    def reset(self, row):
        self.row, self.turns, self.seen = row, 0, []
        return [{"role": "user", "content": f"Say {row['points']}"}]

    def step(self, completion):
        self.turns += 1
        self.seen.append(completion)
        return [{"role": "tool", "content": f"{len(completion)} letters"}] if self.turns < 3 else []

    def reward(self):
        return self.turns / self.row["points"]


class Lengths(Echo):
    """It takes any row. The reward depends on all that the model said."""

    columns = ()

    def reset(self, row):
        return super().reset({"points": 1})

    def reward(self):
        return sum(map(len, self.seen)) / 64 + self.turns


class Remembers(Echo):
    """Its replies show what only its own process and instance can know."""

    def step(self, completion):
        super().step(completion)
        return [{"role": "user", "content": f"{os.getpid()} {'|'.join(self.seen)}"}]


class HangsOnB(Echo):
    def step(self, completion):
        if "b" in completion:
            time.sleep(3600)
        return super().step(completion)


class DiesOnB(Echo):
    def step(self, completion):
        if "b" in completion:
            os._exit(7)
        return super().step(completion)


class RaisesOnB(Echo):
    def step(self, completion):
        if "b" in completion:
            raise KeyError("no such thing")
        return super().step(completion)


class DiesInReset(Echo):
    def reset(self, row):
        if row["points"] == 2:
            os._exit(7)
        return super().reset(row)


class DiesOnceInReset(Echo):
    def reset(self, row):
        mark = row.get("mark")
        if row["points"] == 2 and mark and not os.path.exists(mark):
            open(mark, "w").close()
            os._exit(7)
        return super().reset(row)


class HangsInReset(Echo):
    def reset(self, row):
        time.sleep(3600)


class Text(Echo):
    def step(self, completion):
        return "a reply"


class Objects(Echo):
    def step(self, completion):
        return [object()]


class NoContent(Echo):
    def step(self, completion):
        return [{"role": "user", "text": "a reply"}]


class Assistant(Echo):
    def step(self, completion):
        return [{"role": "assistant", "content": "I answer myself"}]


class EmptyReset(Echo):
    def reset(self, row):
        return []


class AnswersItself(Echo):
    def reset(self, row):
        return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


class NotANumber(Echo):
    def reward(self):
        return float("nan")


class Word(Echo):
    def reward(self):
        return "good"


class Unscored(Echo):
    def reward(self):
        return None


class NoReward:
    def reset(self, row):
        return []

    def step(self, completion):
        return []


class Dice(Echo):
    def reward(self):
        return random.SystemRandom().random()


def not_a_class():
    return None
