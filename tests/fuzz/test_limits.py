"""The limits of fuzzing hold: each kind of failure that they are to notice is provoked."""

import pytest
from fuzz.limits import run_limited

pytestmark = pytest.mark.slow


def test_what_is_refused_passes_and_is_counted(tmp_path):
    assert run_limited("fuzz.limit_inputs:refusals", tmp_path) == {"tried": 3, "refused": 2}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("traceback", "ZeroDivisionError"),
        ("memory", "MemoryError"),
        ("hang", "took more than 1 seconds"),
        ("write", "Outside: open /"),
        ("hidden_write", "Outside: open /"),
        ("removal", "Outside: os.remove /"),
        ("program", "Outside: subprocess.Popen"),
        ("silent", "a refusal without a word"),
    ],
)
def test_every_failure_is_noticed(name, complaint, tmp_path):
    with pytest.raises(AssertionError, match=complaint):
        run_limited(f"fuzz.limit_inputs:{name}", tmp_path / "own", memory_mb=256, seconds_each=1)
