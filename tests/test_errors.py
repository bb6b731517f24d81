"""Messages for people."""

from jaxft.errors import did_you_mean, listed


def test_a_list_names_the_first_items_and_counts_the_rest():
    assert listed([]) == ""
    assert listed(["a", "b"]) == "a, b"
    assert listed(range(10), 8) == "0, 1, 2, 3, 4, 5, 6, 7 and 2 more"
    assert listed(range(3000), 2) == "0, 1 and 2,998 more"


def test_a_list_on_lines_is_indented():
    assert listed([], lines=True) == ""
    assert listed(["a", "b"], 2, lines=True) == "  a\n  b"
    assert listed(["a", "b", "c"], 2, lines=True) == "  a\n  b\n  ... and 1 more"


def test_a_near_miss_is_suggested_and_a_far_one_is_not():
    assert did_you_mean("batch_sise", ["batch_size", "steps"]) == " Did you mean 'batch_size'?"
    assert did_you_mean("zzz", ["batch_size", "steps"]) == ""
