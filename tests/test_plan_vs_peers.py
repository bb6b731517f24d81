"""The comparison with peers: numbers extrapolated over layers, and reasons for missing columns."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("plan_vs_peers")


def column_of(layers: int) -> dict[str, object]:
    return {
        "hbm_bytes": 100 + 10 * layers,
        "argument_bytes": 10 * layers,
        "temp_bytes": 100,
        "flops": 7 * layers,
        "flops_over_ideal": 1.5,
        "collective_bytes": 5 * layers,
        "collective_bytes_by_kind": {"all-gather": 5 * layers, **({"all-reduce": 1} if layers > 2 else {})},
        "compile_cpu_seconds": 20.0 + layers,
        "unknown": [],
        "versions": {"jax": "1", "libtpu": "2"},
    }


def test_a_straight_line_through_two_depths_is_exact_for_linear_numbers(benchmark: ModuleType) -> None:
    result = benchmark.extrapolated([column_of(2), column_of(4)], (2, 4))
    expected = column_of(32)
    assert result["hbm_bytes"] == expected["hbm_bytes"]
    assert result["flops"] == expected["flops"]
    assert result["compile_cpu_seconds"] == expected["compile_cpu_seconds"]
    assert result["collective_bytes_by_kind"] == {"all-gather": 160, "all-reduce": 15}


def test_the_table_gives_a_column_to_each_and_says_why_one_is_missing(benchmark: ModuleType) -> None:
    columns = {
        "jaxft": column_of(32) | {"note": None},
        "maxtext": {"missing": "does not do this: no adapters"},
        "tunix": column_of(32) | {"note": "extrapolated from 2 and 4 layers"},
    }
    text = benchmark.table("8b-lora-v5e-8", columns)
    lines = text.splitlines()
    assert lines[1].split() == ["jaxft", "tunix"]
    assert "maxtext: does not do this: no adapters" in lines
    assert "tunix: extrapolated from 2 and 4 layers" in lines
    assert any(line.split() == ["all-gather", "0.0", "0.0"] for line in lines)


def test_a_config_and_a_reason_stand_for_every_row(benchmark: ModuleType) -> None:
    for row in benchmark.ROWS.values():
        assert (BENCHMARKS.parent / row.config).is_file()
        assert row.batch % row.devices == 0
        assert any(peer.missing(row) is None for peer in benchmark.PEERS.values())


def test_no_interpreter_is_refused(benchmark: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no interpreter python9\.9, .* --python=PATH"):
        benchmark.environment_of("tunix", "google-tunix", tmp_path, "python9.9")
