"""The reward of the configs for GSM8K, and the prompts that its file makes of GSM8K's rows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.rollouts.reward_functions import RewardFunctions

FILE = Path(__file__).parents[2] / "configs" / "reward_functions" / "gsm8k.py"
ROW = {"question": "How many eggs?", "answer": "She sells 9 * 2 = $<<9*2=18>>18.\n#### 1,018"}
ANSWERS = {
    "Nine eggs.\n#### 1018": 1.0,
    "#### $1,018.00": 1.0,
    "So it is 1018.": 0.5,
    "1018, or\n#### 18": 0.0,
    "#### ": 0.0,
    "I cannot say": 0.0,
}


@pytest.fixture(scope="module")
def right_number():
    functions = {}
    exec(compile(FILE.read_text(encoding="utf-8"), str(FILE), "exec"), functions)
    return functions["right_number"]


def test_an_answer_ends_in_the_number_of_the_reference(right_number):
    given = list(ANSWERS)
    assert right_number(given, [ROW["answer"]] * len(given), prompts=given) == list(ANSWERS.values())
    assert right_number(["#### -3"], ["#### 3"]) == [0.0]
    # The rows of a smoke run have other references.
    assert right_number(["yes ", "no"], ["yes", "yes"]) == [1.0, 0.0]


def test_the_file_makes_prompts_of_rows():
    done = subprocess.run(
        [sys.executable, str(FILE)], input=json.dumps(ROW) + "\n", capture_output=True, text=True, check=True
    )
    prompt = json.loads(done.stdout)
    assert [message["role"] for message in prompt["prompt"]] == ["system", "user"]
    assert prompt["prompt"][1]["content"] == ROW["question"] and prompt["reference"] == ROW["answer"]
    assert "####" in prompt["prompt"][0]["content"]


def test_a_run_can_call_it():
    functions = RewardFunctions(f"{FILE}:right_number", workers=1, timeout_seconds=30.0, completions="text")
    functions.check({"reference"})
    functions.close()
