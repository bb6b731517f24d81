"""The options of `jaxft pod run`: what is refused, what follows from the kind of TPU, and the worst case in money."""

import dataclasses
import json

import pytest

from jaxft.config import load
from jaxft.errors import ConfigError
from jaxft.hardware.topology import parse
from jaxft.pods.machines import MACHINES, accelerator_type, chips_of_host, hosts_of_slice
from jaxft.pods.money import check_limit, rate_of
from jaxft.pods.request import Request, name_of

REQUEST = Request(name="run-1", topology="v6e:4x4", zones=("us-east5-b",), to="gs://bucket/run-1", max_hours=4.0)


def changed(**options):
    return dataclasses.replace(REQUEST, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "Run_1"}, r"--name=Run_1: Google .* Write --name=run-1"),
        ({"name": "a" * 41}, "up to 40 small letters"),
        ({"name": "a-"}, "the last no dash"),
        ({"zones": ()}, "--zone is missing: .* such as --zone="),
        ({"zones": ("us-east5",)}, "--zone=us-east5 is no name of a zone: .* us-east5-b"),
        ({"zones": ("us-east5-b", "us-east5-b")}, "names a zone twice"),
        ({"project": "My Project"}, "no id of a project: `gcloud projects list`"),
        ({"to": "gs://bucket"}, "a folder inside a bucket, such as --to=gs://BUCKET/RUN"),
        ({"to": "s3://bucket/run"}, "write to gs://BUCKET/RUN"),
        ({"to": "runs/one"}, "has 4 hosts, .* Give a bucket"),
        ({"topology": "v6e:4x2"}, "no such slice of v6e. Shapes: 1x1, 2x2"),
        ({"topology": "v5p:2x1x1"}, "The smallest slice is v5p:2x2x1"),
        ({"topology": "h100:8"}, "h100 is none. Kinds: v4, v5e"),
        ({"topology": "v6e:4x4", "slices": 0}, "at least one slice"),
        ({"topology": "tpu7x:2x2x1", "api": "tpu"}, "only Compute Engine has tpu7x.* set --api=compute"),
        ({"topology": "v4:2x2x1", "api": "compute"}, "only the Cloud TPU API has v4.* set --api=tpu"),
        ({"topology": "v5e:4x4", "api": "compute"}, "only the Cloud TPU API has v5e"),
        ({"api": "gke"}, "--api=gke is not one of auto, compute, tpu"),
        ({"spot": True, "flex_start": True}, "--spot and --flex_start are different ways"),
        ({"spot": True, "reservation": "r"}, "--spot and --reservation are different ways"),
        ({"flex_start": True, "max_hours": 200.0}, "live at most 168 hours"),
        ({"max_hours": 0.0}, "--max_hours=0 must be above zero"),
        ({"max_usd": float("inf")}, "--max_usd=inf must be above zero and finite"),
        ({"queue_hours": -1.0}, "--queue_hours=-1 must be above zero"),
        ({"retries": -1}, "zero or more"),
        ({"disk_gb": 10}, "--disk_gb=10: .* Set it to 200"),
        ({"env": ("HF_TOKEN=hf_x",)}, "Give the name alone"),
        ({"internal_ip": True, "iap": True}, "different ways to reach a host"),
    ],
)
def test_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        changed(**options)


@pytest.mark.parametrize(
    ("topology", "provider", "accelerator", "chips", "hosts"),
    [
        ("v4:2x2x2", "tpu", "v4-16", 4, 2),
        ("v5e:2x4", "tpu", "v5litepod-8", 8, 1),
        ("v5e:4x4", "tpu", "v5litepod-16", 4, 4),
        ("v5p:2x2x1", "compute", "v5p-8", 4, 1),
        ("v6e:1x1", "compute", "v6e-1", 1, 1),
        ("v6e:16x16", "compute", "v6e-256", 4, 64),
        ("tpu7x:2x2x2", "compute", None, 4, 2),
    ],
)
def test_kinds(topology, provider, accelerator, chips, hosts):
    request, shape = changed(topology=topology), parse(topology)
    assert (request.provider, chips_of_host(shape), hosts_of_slice(shape), request.hosts) == (
        provider, chips, hosts, hosts,
    )  # fmt: skip
    if accelerator is not None:
        assert accelerator_type(shape) == accelerator
    machine = MACHINES[shape.chip.name]
    assert provider == "tpu" or chips in machine.machine_types


def test_a_single_host_may_write_to_a_folder():
    assert not changed(topology="v6e:2x4", to="runs/one").is_remote


@pytest.mark.parametrize("option", [{"spot": True}, {"flex_start": True}])
def test_machines_that_are_taken_away_need_checkpoints(option):
    config = load("configs/quickstart.py:smoke", [])
    without = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=None))
    with pytest.raises(ConfigError, match=r"without checkpoint.every .* --config.checkpoint.every=100"):
        changed(**option).check_config(without)
    saved = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, every=2))
    changed(**option).check_config(saved)
    REQUEST.check_config(without)  # machines on demand stay


def test_a_request_comes_back_from_json():
    request = changed(env=("HF_TOKEN",), spot=True, max_usd=500.0, slices=2)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


@pytest.mark.parametrize("folder", ["runs/My Model_v2", "gs://b/2024-Run/", "/", "x" * 60, "runs/ä"])
def test_a_folder_gives_a_name_that_is_taken(folder):
    changed(name=name_of(folder))


def test_worst_case():
    assert check_limit(REQUEST).at_most(4.0) == "at most 4.0 h, USD 172.80 (16 v6e x 2.70)"
    assert rate_of(changed(spot=True, slices=2)).usd(1.0) == pytest.approx(32 * 1.08)
    check_limit(changed(max_usd=172.80))


@pytest.mark.parametrize(
    ("limit", "match"),
    [(100.0, r"could cost more, at most 4.0 h.*lower --max_hours to 2.31"), (0.1, "raise --max_usd$")],
)
def test_more_than_the_limit_is_refused(limit, match):
    with pytest.raises(ConfigError, match=match):
        check_limit(changed(max_usd=limit))


def test_a_lower_limit_of_hours_is_a_mend():
    check_limit(changed(max_usd=100.0, max_hours=2.31))


def test_no_spot_price_is_refused(tmp_path):
    file = tmp_path / "prices.json"
    file.write_text('{"date": "2026-01-01", "chips": {"v6e": {"on_demand": 3.0, "spot": null}}}')
    with pytest.raises(ConfigError, match="no spot price of v6e"):
        rate_of(changed(spot=True, prices=str(file)))


def test_a_folder_that_hosts_share_takes_several(tmp_path):
    shared = changed(topology="v6e:4x4", to=str(tmp_path), shared=True, detach=True)
    assert shared.hosts == 4 and Request.from_json(shared.to_json()) == shared
    for to in ("gs://bucket/run", "runs/here"):
        with pytest.raises(ConfigError, match="absolute path there"):
            changed(to=to, shared=True)


def test_nobody_would_bring_the_run_of_a_detached_start_home():
    with pytest.raises(ConfigError, match="Leave out --detach, or give a bucket"):
        changed(topology="v6e:2x2", to="runs/here", detach=True)
