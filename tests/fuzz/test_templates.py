"""Chat templates: whatever they are, they render rows or are refused, within bounds of time and memory."""

import pytest

pytest.importorskip("hypothesis")

from fuzz.limits import run_limited  # after the check

pytestmark = pytest.mark.slow


def test_templates_render_or_are_refused(tmp_path):
    report = run_limited("fuzz.template_inputs:templates_of_any_kind", tmp_path)
    assert report["tried"] >= 2_000 and 0 < report["refused"] < report["tried"]
