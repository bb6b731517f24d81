"""Reward functions of the tests: right ones, and one for each way to fail. Imported in the processes of the pool."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from jaxft.evaluation import verifiers


def length(completions):
    return [float(len(one)) for one in completions]


def odd(completion_ids, **columns):
    """The share of odd tokens, which any model can raise."""
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]


def named(prompts, completions, *, answer, weight=1.0):
    return [weight * float(one == right) for one, right in zip(completions, answer, strict=True)]


def everything(completions, **columns):
    return [float(len(columns))] * len(completions)


async def slowly(completions):
    await asyncio.sleep(0)
    return [None if not one else 1.0 for one in completions]


def talks(completions):
    print("a line on the standard output")
    sys.stdout.write("another\n")
    return [2.0] * len(completions)


def hangs_on_b(completions):
    if "b" in completions:
        time.sleep(3600)
    return [1.0] * len(completions)


def raises_on_b(completions):
    if "b" in completions:
        raise KeyError("no such thing")
    return [1.0] * len(completions)


def raises_on_several(completions):
    if len(completions) > 1:
        raise ValueError("one at a time")
    return [1.0]


def one_too_few(completions):
    return [1.0] * (len(completions) - 1)


def text(completions):
    return ["good"] * len(completions)


def not_a_number(completions):
    return [float("nan")] * len(completions)


def one_number(completions):
    return 1.0


def dies(completions):
    os._exit(7)


def dies_once(completions, folder):
    mark = Path(folder[0]) / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(completions)


def expects_messages(completions):
    return [float(len(one[0]["content"])) for one in completions]


def leaves(completions):
    sys.exit(3)


def raises_and_then_hangs(completions):
    if len(completions) > 1:
        raise ValueError("before it hangs")
    time.sleep(3600)


class Points:
    """A number of the function's own, whose class the run does not have."""

    def __float__(self):
        return 3.0


def own_numbers(completions):
    return [Points() for _ in completions]


def beyond_floats(completions):
    return [10**400] * len(completions)


def expects_text(completions):
    return [float(len(one.strip())) for one in completions]


KEPT = {}


async def keeps_its_loop(completions):
    loop = KEPT.setdefault("loop", asyncio.get_running_loop())
    return [float(loop is asyncio.get_running_loop())] * len(completions)


def remembers(completions):
    KEPT["by another"] = 5.0
    return [0.0] * len(completions)


def recalls(completions):
    return [KEPT.get("by another", 0.0)] * len(completions)


def starts_processes(completions, folder):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    own, tested = (Path(folder[0]) / name for name in ("own", "tested"))
    own.write_text(str(child.pid))
    code = f"import os, time; open({str(tested)!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    return verifiers.python_tests([code], ["pass"])


def throws_dice(completions):
    return [random.SystemRandom().random() for _ in completions]
