"""The choice of a rematerialisation policy by its memory, and what is said of it."""

import pytest

from jaxft.hardware.attached import memory_limit
from jaxft.hardware.recomputation import MARGIN, POLICIES, by_arithmetic

PEAKS = {"none": 80, "dots": 60, "attention": 40, "full": 30, "offload": 20}
PRODUCTS = {"none": 1.0, "dots": 1.02, "attention": 1.4, "full": 1.5, "offload": 1.5}


def chosen(limit):
    return by_arithmetic(lambda policy: (PEAKS[policy], PRODUCTS[policy]), limit)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_one_that_leaves_the_margin_is_taken(policy):
    just = -int(-PEAKS[policy] // MARGIN)
    assert chosen(just).policy == policy
    assert chosen(just).after == POLICIES[POLICIES.index(policy) + 1 :]
    assert chosen(just - 1).policy == (*POLICIES, "offload")[POLICIES.index(policy) + 1]


def test_what_needs_least_is_taken_and_told_if_nothing_fits():
    assert chosen(1).policy == "offload" and chosen(1).after == ()
    assert "no policy takes less than 90% of the memory" in chosen(1).describe()


def test_the_compiler_has_the_last_word():
    first = chosen(100)
    assert first.describe() == (
        "model.remat='auto' takes 'none': 0.00 of 0.00 GiB a device by arithmetic; its products are 1.00 times the "
        "model's own"
    )
    second = first.refused()
    assert (second.policy, second.after) == ("dots", ("attention", "full", "offload"))
    for part in ("takes 'dots'", "'none' would take", "1.02 times", "the compiler refused 'none' for its memory"):
        assert part in second.describe()


class Device:
    process_index = 0

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_the_device_with_least_memory_limits_all():
    assert memory_limit([Device({"bytes_limit": 7}), Device({"bytes_limit": 5})]) == 5
    assert memory_limit([Device(None)]) is None and memory_limit([Device({"bytes_in_use": 5})]) is None
