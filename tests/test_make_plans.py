"""Configs for real slices contain their plan: lines that parse, are consistent, and are up to date."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from jaxft.assets import ASSETS
from jaxft.config import load
from jaxft.hardware.topology import parse

ROOT = Path(__file__).parents[1]
# These run on any machine.
SMALL = ("quickstart", "smollm2_")
LARGE = sorted(path for path in (ROOT / "configs").glob("*.py") if not path.stem.startswith(SMALL))
by_name = pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)


def _make_plans() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_plans", ROOT / "docs" / "make_plans.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_plans = _make_plans()
PLAN = {
    "fits": True, "compiled": True, "topology": "v5e:2x4", "batch_size": 16, "max_length": 4096, "chips": 8,
    "hbm_peak_bytes": 7 * 2**30, "hbm_limit_bytes": 16 * 2**30, "step_seconds": 3.6, "usd_per_chip_hour": 1.5,
    "tokens_per_second_per_chip": 2275.6,
}  # fmt: skip
LINE = (
    "Planned for v5e:2x4: 16 x 4,096 tokens, 7.00 of 16.00 GiB HBM, 2,276 tokens/s a chip; 1,000 steps: 1.00 h, "
    "USD 12.00"
)


@by_name
def test_a_config_for_a_slice_says_what_was_planned(path: Path) -> None:
    planned, config = make_plans.read(path), load(str(path))
    topology = parse(planned.topology)
    assert (planned.batch_size, planned.max_length) == (config.train.batch_size, config.data.max_length)
    assert 0 < planned.used <= planned.limit
    assert planned.limit == pytest.approx(
        topology.chip.hbm_bytes / topology.chip.devices / 2**30, abs=0.006
    )  # two decimals
    # Time and money follow from the speed and the table of prices.
    tokens = 1000 * planned.batch_size * planned.max_length
    # The speed is rounded to a whole number, and the hours to two decimals.
    least, most = (tokens / speed / topology.chips / 3600 for speed in (planned.speed + 0.5, planned.speed - 0.5))
    assert least - 0.005 <= planned.hours <= most + 0.005
    price = json.loads((ASSETS / "prices.json").read_text(encoding="utf-8"))["chips"][topology.chip.name]["on_demand"]
    assert planned.usd == pytest.approx(planned.hours * topology.chips * price, abs=0.006 * topology.chips * price)


def test_small_configs_name_no_slice() -> None:
    small = sorted(set((ROOT / "configs").glob("*.py")) - set(LARGE))
    assert small and not [path.stem for path in small if make_plans.topology_in(path)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text('"""A run.\n\nPlanned for v5e:2x4: no figures yet\n"""\n\nx = 1\n')
    planned = make_plans.line_of(PLAN)
    make_plans.write(path, planned)
    assert path.read_text() == f'"""A run.\n\n{LINE}\n"""\n\nx = 1\n'
    assert make_plans.read(path) == planned
    make_plans.write(path, dataclasses.replace(planned, batch_size=32))
    assert make_plans.read(path).batch_size == 32 and path.read_text().count("Planned") == 1


def test_lines_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text('"""Planned for v5e:2x4: no figures yet\n"""\n')
    with pytest.raises(SystemExit, match=r"one\.py: its docstring has no .*run python docs/make_plans\.py one"):
        make_plans.read(path)
    path.write_text(f'"""\n{LINE}\n{LINE}\n"""\n')
    with pytest.raises(SystemExit, match="has 2 lines"):
        make_plans.read(path)
    with pytest.raises(SystemExit, match=r"fits=False.*larger slice"):
        make_plans.line_of(PLAN | {"fits": False})
    with pytest.raises(SystemExit, match="compiled=False"):
        make_plans.line_of(PLAN | {"compiled": False})
    with pytest.raises(SystemExit, match="there is no .*no_such_config"):
        make_plans.main(["no_such_config"])
    with pytest.raises(SystemExit, match="quickstart.py names no slice"):
        make_plans.main(["quickstart"])


@pytest.mark.slow
def test_lines_are_fresh() -> None:
    """The two that cost least, compiled anew: large models take longer and share their code."""
    pytest.importorskip("libtpu")
    for path in sorted(LARGE, key=lambda path: make_plans.read(path).usd)[:2]:
        written, now = make_plans.read(path), make_plans.plan(path)
        assert now.topology == written.topology
        again = f"run python docs/make_plans.py {path.stem}"
        assert now.used == pytest.approx(written.used, rel=0.03), again
        assert now.speed == pytest.approx(written.speed, rel=0.05), again
