"""The gcloud commands of both providers for each way to buy machines, read from a cloud on paper."""

import dataclasses
import shlex

import pytest

from jaxft.errors import PodError
from jaxft.pods.command import Done
from jaxft.pods.dry_run import DryRun
from jaxft.pods.gcloud import CapacityError
from jaxft.pods.providers import slices_of
from jaxft.pods.request import Request
from jaxft.pods.slices import Phase

BASE = Request(
    name="run-1", topology="v5e:4x4", zones=("us-east5-b",), to="gs://bucket/run-1", project="my-project",
    max_hours=4.0,
)  # fmt: skip
WHERE = "--project=my-project --zone=us-east5-b"
NODE = "--scopes=https://www.googleapis.com/auth/cloud-platform --labels=jaxft-run=run-1"
QUEUE = "--runtime-version=v2-alpha-tpuv5-lite --node-id=run-1-1"
VM = (
    "--maintenance-policy=TERMINATE --scopes=cloud-platform --max-run-duration=14400s "
    "--instance-termination-action=DELETE --boot-disk-size=200GB --labels=jaxft-run=run-1,jaxft-node=run-1-1"
)
IMAGE = "--image-family=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e --image-project=ubuntu-os-accelerator-images"
CREATE = "gcloud compute tpus queued-resources create run-1-1"

# Options -> the commands of create(), without --quiet.
CASES = {
    "tpu, on demand": (
        {},
        [f"gcloud compute tpus tpu-vm create run-1-1 {WHERE} --accelerator-type=v5litepod-16 {NODE} "
         "--version=v2-alpha-tpuv5-lite"],
    ),
    "tpu, spot": (
        {"topology": "v4:2x2x2", "spot": True},
        [f"gcloud compute tpus tpu-vm create run-1-1 {WHERE} --accelerator-type=v4-16 {NODE} "
         "--version=tpu-ubuntu2204-base --spot"],
    ),
    "tpu, in the queue": (
        {"queue_hours": 6.0, "network": "net", "subnetwork": "sub", "service_account": "a@b.c", "internal_ip": True},
        [f"{CREATE} {WHERE} --accelerator-type=v5litepod-16 {NODE} --network=net --subnetwork=sub "
         f"--service-account=a@b.c --internal-ips {QUEUE} --valid-until-duration=21600s --async"],
    ),
    "tpu, several slices, spot": (
        {"slices": 2, "spot": True},
        [f"{CREATE} {WHERE} --accelerator-type=v5litepod-16 {NODE} --runtime-version=v2-alpha-tpuv5-lite "
         "--node-count=2 --node-prefix=run-1-1 --valid-until-duration=86400s --async --spot"],
    ),
    "tpu, flex-start": (
        {"flex_start": True},
        [f"gcloud alpha compute tpus queued-resources create run-1-1 {WHERE} --accelerator-type=v5litepod-16 {NODE} "
         f"{QUEUE} --valid-until-duration=86400s --async --provisioning-model=flex-start --max-run-duration=14400s"],
    ),
    "tpu, a reservation": (
        {"reservation": "r1"},
        [f"gcloud alpha compute tpus queued-resources create run-1-1 {WHERE} --accelerator-type=v5litepod-16 {NODE} "
         f"{QUEUE} --valid-until-duration=86400s --async --reserved --reservation=r1"],
    ),
    "tpu, a kind of both": (
        {"topology": "v6e:2x2", "api": "tpu"},
        [f"gcloud compute tpus tpu-vm create run-1-1 {WHERE} --accelerator-type=v6e-4 {NODE} "
         "--version=v2-alpha-tpuv6e"],
    ),
    "tpu, another torus of v4": (
        {"topology": "v4:2x2x8"},
        [f"gcloud compute tpus tpu-vm create run-1-1 {WHERE} --type=v4 --topology=2x2x8 {NODE} "
         "--version=tpu-ubuntu2204-base"],
    ),
    "tpu, another torus of v5p": (
        {"topology": "v5p:2x2x8", "api": "tpu"},
        [f"gcloud alpha compute tpus tpu-vm create run-1-1 {WHERE} --type=v5p --topology=2x2x8 {NODE} "
         "--version=v2-alpha-tpuv5"],
    ),
    "compute, one host": (
        {"topology": "v6e:2x4", "iap": True},
        [f"gcloud compute instances create run-1-1 {WHERE} --machine-type=ct6e-standard-8t {IMAGE} {VM} --no-address"],
    ),
    "compute, two slices of one host, spot": (
        {"topology": "v6e:2x2", "slices": 2, "spot": True},
        [f"gcloud compute instances create run-1-1-{number} {WHERE} --machine-type=ct6e-standard-4t {IMAGE} {VM} "
         "--provisioning-model=SPOT" for number in range(2)],
    ),
    "compute, flex-start": (
        {"topology": "v6e:1x1", "flex_start": True},
        [f"gcloud compute instances create run-1-1 {WHERE} --machine-type=ct6e-standard-1t {IMAGE} {VM} "
         "--provisioning-model=FLEX_START --reservation-affinity=none --request-valid-for-duration=7200s --async"],
    ),
    "compute, a group": (
        {"topology": "v5p:2x2x2"},
        [f"gcloud compute instance-templates create run-1-1 --project=my-project --machine-type=ct5p-hightpu-4t "
         f"{IMAGE} {VM}",
         "gcloud compute resource-policies create workload-policy run-1-1 --project=my-project --region=us-east5 "
         "--type=HIGH_THROUGHPUT --accelerator-topology=2x2x2 --description=jaxft-run=run-1",
         f"gcloud compute instance-groups managed create run-1-1 {WHERE} --size=2 --template=run-1-1 "
         "--base-instance-name=run-1-1 --workload-policy=projects/my-project/regions/us-east5/resourcePolicies/run-1-1 "
         "--default-action-on-vm-failure=do-nothing --description=jaxft-run=run-1"],
    ),
    "compute, two groups of tpu7x, a reservation": (
        {"topology": "tpu7x:2x2x2", "slices": 2, "reservation": "r1"},
        ["gcloud compute instance-templates create run-1-1 --project=my-project --machine-type=tpu7x-standard-4t "
         "--image-family=ubuntu-accel-2404-amd64-tpu-tpu7x --image-project=ubuntu-os-accelerator-images "
         f"{VM} --boot-disk-type=hyperdisk-balanced --provisioning-model=RESERVATION_BOUND "
         "--reservation-affinity=specific --reservation=r1",
         *(line for number in range(2) for line in (
             f"gcloud compute resource-policies create workload-policy run-1-1-{number} --project=my-project "
             "--region=us-east5 --type=HIGH_THROUGHPUT --accelerator-topology=2x2x2 --description=jaxft-run=run-1",
             f"gcloud compute instance-groups managed create run-1-1-{number} {WHERE} --size=2 --template=run-1-1 "
             f"--base-instance-name=run-1-1-{number} "
             f"--workload-policy=projects/my-project/regions/us-east5/resourcePolicies/run-1-1-{number} "
             "--default-action-on-vm-failure=do-nothing --description=jaxft-run=run-1",
         ))],
    ),
}  # fmt: skip
each_case = pytest.mark.parametrize(("options", "expected"), CASES.values(), ids=CASES)


def on_paper(options, answer=lambda argv: Done(0, "", "")):
    lines = []
    request = dataclasses.replace(BASE, **options)
    cloud = DryRun(request, lines.append, answer)
    slices = slices_of(request, attempt=1, zone="us-east5-b", run=cloud, sleep=lambda seconds: None)
    return slices, lines, cloud


@each_case
def test_creation(options, expected):
    slices, lines, _ = on_paper(options)
    slices.create()
    assert lines == [f"{line} --quiet" for line in expected]


@each_case
def test_a_whole_life_leaves_nothing(options, expected):
    slices, lines, cloud = on_paper(options)
    assert slices.state().phase == Phase.ABSENT
    slices.create()
    assert slices.state().phase == Phase.READY
    workers = slices.workers()
    hosts = slices.request.hosts
    assert [(one.number, one.slice, one.host) for one in workers] == [
        (number, *divmod(number, hosts)) for number in range(hosts * slices.request.slices)
    ]
    assert len({one.address for one in workers}) == len(workers)
    slices.delete()
    assert not cloud.created and slices.state().phase == Phase.ABSENT
    # Everything that was created was deleted by name.
    for line in expected:
        words = [word for word in shlex.split(line) if not word.startswith("--")]
        for name in (word for word in words if word.startswith("run-1-1")):
            assert any(f"delete {name} " in line for line in lines), name


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "gcloud compute tpus tpu-vm ssh run-1-1 --project=my-project --zone=us-east5-b --worker=2"),
        ({"iap": True}, "gcloud alpha compute tpus tpu-vm ssh run-1-1 --project=my-project --zone=us-east5-b "
                        "--worker=2 --tunnel-through-iap"),
        ({"topology": "v6e:4x4"}, "gcloud compute ssh run-1-1-0002 --project=my-project --zone=us-east5-b"),
        ({"topology": "v6e:4x4", "internal_ip": True},
         "gcloud compute ssh run-1-1-0002 --project=my-project --zone=us-east5-b --internal-ip"),
    ],
)  # fmt: skip
def test_a_host_is_reached(options, expected):
    commands = []
    slices, lines, _ = on_paper(options, lambda argv: commands.append(argv) or Done(3, "out", "err"))
    slices.create()
    worker = slices.workers()[2]
    assert slices.ssh(worker, ["echo", "a b", "$HOME"], stdin=b"secret") == Done(3, "out", "err")
    assert commands == [("echo", "a b", "$HOME")]
    assert lines[-1].startswith(expected + " --ssh-flag=-oConnectTimeout=30") and "secret" not in lines[-1]
    slices.copy(worker, "/tmp/archive", "jaxft/archive")
    assert f" scp /tmp/archive {worker.node}:jaxft/archive " in lines[-1]
    slices.fetch(worker, "jaxft/log", "/tmp/log")
    assert f" scp {worker.node}:jaxft/log /tmp/log " in lines[-1]


@pytest.mark.parametrize("options", [{}, {"topology": "v6e:2x2"}, {"topology": "v6e:4x4"}, {"slices": 2}])
def test_what_is_there_is_taken_up_and_what_is_of_others_stays(options):
    slices, _, cloud = on_paper(options)
    slices.create()
    taken = dict(cloud.created)

    def there(argv, **how):
        if "create" in argv:
            return Done(1, "", "ERROR: (gcloud) ALREADY_EXISTS: Resource already exists")
        return cloud(argv, **how)

    again = slices_of(slices.request, attempt=1, zone="us-east5-b", run=there, sleep=lambda seconds: None)
    again.create()  # a second time changes nothing
    for one in cloud.created.values():
        one["labels"], one["description"], one["tpu"] = {}, "mine", {}
    with pytest.raises(PodError, match="does not have the label jaxft-run=run-1, .* another --name"):
        again.create()
    with pytest.raises(PodError, match="leaves it alone"):
        again.delete()
    assert set(cloud.created) == set(taken)


def scripted(answers):
    """A Run that answers a describe or a list by the first key that its command has; creation and deletion succeed."""

    def run(argv, *, stdin=b"", seconds=None):
        line = shlex.join(argv)
        for key, done in answers.items():
            if key in line:
                return done if isinstance(done, Done) else Done(0, done, "")
        return Done(1, "", f"ERROR: NOT_FOUND: Resource {' '.join(argv)} was not found")

    return run


def state_of(options, answers):
    request = dataclasses.replace(BASE, **options)
    slices = slices_of(request, attempt=1, zone="us-east5-b", run=scripted(answers), sleep=lambda seconds: None)
    return slices.state()


GONE = Phase.LOST


@pytest.mark.parametrize(
    ("word", "phase"),
    [("CREATING", Phase.CREATING), ("STARTING", Phase.CREATING), ("READY", Phase.READY), ("RESTARTING", GONE),
     ("REIMAGING", GONE), ("REPAIRING", GONE), ("STOPPING", GONE), ("STOPPED", GONE), ("PREEMPTED", GONE),
     ("TERMINATED", GONE), ("HIDDEN", GONE), ("DELETING", Phase.DELETING)],
)  # fmt: skip
def test_states_of_a_node(word, phase):
    state = state_of({}, {"tpu-vm describe": f'{{"state": "{word}", "health": "TIMEOUT"}}'})
    assert (state.phase, state.raw) == (phase, word)


@pytest.mark.parametrize(
    ("word", "phase"),
    [("CREATING", Phase.WAITING), ("ACCEPTED", Phase.WAITING), ("WAITING_FOR_RESOURCES", Phase.WAITING),
     ("PROVISIONING", Phase.CREATING), ("SUSPENDING", GONE), ("SUSPENDED", GONE), ("DELETING", Phase.DELETING)],
)  # fmt: skip
def test_states_of_a_queue(word, phase):
    answers = {"queued-resources describe": f'{{"state": {{"state": "{word}"}}}}'}
    assert state_of({"queue_hours": 1.0}, answers).phase == phase


@pytest.mark.parametrize(
    ("word", "phase"),
    [("PENDING", Phase.WAITING), ("PROVISIONING", Phase.CREATING), ("STAGING", Phase.CREATING),
     ("RUNNING", Phase.READY), ("STOPPING", GONE), ("SUSPENDED", GONE), ("TERMINATED", GONE), ("REPAIRING", GONE),
     ("DEPROVISIONING", Phase.DELETING)],
)  # fmt: skip
def test_states_of_an_instance(word, phase):
    listed = f'[{{"name": "run-1-1", "status": "{word}", "labels": {{"jaxft-node": "run-1-1"}}}}]'
    assert state_of({"topology": "v6e:2x2"}, {"instances list": listed}).phase == phase


@pytest.mark.parametrize(
    ("options", "answers"),
    [
        ({}, {"tpu-vm describe": '{"state": "DREAMING", "name": "run-1-1"}'}),
        ({"slices": 2}, {"queued-resources describe": '{"state": {"state": "DREAMING"}}'}),
        ({"topology": "v6e:2x2"},
         {"list": '[{"name": "run-1-1", "status": "DREAMING", "labels": {"jaxft-node": "run-1-1"}}]'}),
    ],
)  # fmt: skip
def test_a_word_that_is_not_known_is_told(options, answers):
    with pytest.raises(PodError, match="is DREAMING, which this jaxft does not know. Look at it: gcloud"):
        state_of(options, answers)


def test_maintenance():
    upcoming = '"upcomingMaintenance": {"windowStartTime": "2026-12-01T00:00:00Z"}'
    ready = state_of({}, {"describe": f'{{"state": "READY", "health": "HEALTHY", {upcoming}}}'})
    assert ready.phase == Phase.READY and ready.maintenance == "2026-12-01T00:00:00Z"
    assert state_of({}, {"describe": '{"state": "READY", "health": "UNHEALTHY_MAINTENANCE"}'}).phase == Phase.LOST


def test_one_lost_slice_loses_all():
    answers = {
        "queued-resources describe": '{"state": {"state": "ACTIVE"}}',
        "describe run-1-1-0": '{"state": "READY"}', "describe run-1-1-1": '{"state": "PREEMPTED"}',
    }  # fmt: skip
    assert state_of({"slices": 2}, answers).phase == Phase.LOST
    del answers["describe run-1-1-1"]  # gone
    state = state_of({"slices": 2}, answers)
    assert state.phase == Phase.LOST and "1 of 2 parts are gone" in state.message
    del answers["describe run-1-1-0"]
    assert state_of({"slices": 2}, answers).phase == Phase.LOST


MEMBER = '[{"currentAction": "CREATING", "lastAttempt": {"errors": {"errors": [{"code": "%s", "message": "m"}]}}}]'


@pytest.mark.parametrize(
    ("queue_hours", "phase"), [(None, Phase.REFUSED), (2.0, Phase.WAITING)], ids=["refused", "waits"]
)
def test_a_group_without_capacity(queue_hours, phase):
    answers = {"instances list": "[]", "list-instances": MEMBER % "ZONE_RESOURCE_POOL_EXHAUSTED"}
    state = state_of({"topology": "v6e:4x4", "queue_hours": queue_hours}, answers)
    assert state.phase == phase
    assert "Compute Engine in us-east5-b (its quota counts in us-east5" in state.message
    assert "(capacity): ZONE_RESOURCE_POOL_EXHAUSTED: m" in state.message


def test_a_failed_queue_says_why():
    failed = '{"state": {"state": "FAILED", "failedData": {"error": {"code": 8, "message": "no capacity for v4"}}}}'
    state = state_of({"slices": 2}, {"queued-resources describe": failed})
    assert state.phase == Phase.REFUSED
    assert "the Cloud TPU API in us-east5-b" in state.message and "(capacity): code 8: no capacity" in state.message


@pytest.mark.parametrize(
    ("message", "kind", "match"),
    [
        ("ERROR: (gcloud) There is no more capacity in the zone (code: 8)", CapacityError, "capacity.*--zone=A,B"),
        ("ERROR: (gcloud) {'code': 8, 'message': 'no more capacity'}", CapacityError, "(capacity)"),
        ("ERROR: Quota 'TPUV6eLimit' exceeded. Limit: 0 in zone", CapacityError, "(quota).*request quota of this pool"),
        ("ERROR: 429 Too many requests", CapacityError, "(quota)"),
        ("ERROR: The zone does not have enough resources available", CapacityError, "(capacity)"),
        ("ERROR: Specified reservation [r] does not exist", CapacityError, "(reservation)"),
        ("ERROR: HTTPError 403: Quota 'TPUS' exceeded. Limit: 0.0", CapacityError, "(quota)"),
        ("ERROR: PERMISSION_DENIED: no role on the quota project p", PodError, "role that the message names"),
        ("ERROR: PERMISSION_DENIED: tpu.nodes.create", PodError, "role that the message names"),
        ("ERROR: You do not currently have an active account selected", PodError, "gcloud auth login"),
        ("ERROR: unrecognized arguments: --x", PodError, "gcloud components update"),
        ("ERROR: something else", PodError, "run the same command again"),
        ("", PodError, "run the same command again"),
    ],
)
def test_refusals(message, kind, match):
    request = dataclasses.replace(BASE)
    run = scripted({"create": Done(1, "", f"Create request issued\nWARNING: x\n{message}\n")})
    slices = slices_of(request, attempt=1, zone="us-east5-b", run=run)
    with pytest.raises(PodError, match=match) as raised:
        slices.create()
    assert type(raised.value) is kind and message.removeprefix("ERROR: ") in str(raised.value)
    assert "the Cloud TPU API in us-east5-b" in str(raised.value)


def test_no_gcloud_is_said():
    def absent(argv, **how):
        raise FileNotFoundError(argv[0])

    with pytest.raises(PodError, match="Install the Google Cloud CLI"):
        slices_of(BASE, attempt=1, zone="us-east5-b", run=absent).create()


def test_a_deletion_waits_until_the_api_knows_of_nothing():
    left, waits = [4], []

    def slow(argv, **how):
        if "describe" in argv and left[0]:
            left[0] -= 1
            return Done(0, '{"labels": {"jaxft-run": "run-1"}, "state": "DELETING"}', "")
        return Done(1, "", "ERROR: NOT_FOUND: nodes/run-1-1") if "describe" in argv else Done(0, "", "")

    slices_of(BASE, attempt=1, zone="us-east5-b", run=slow, sleep=waits.append).delete()
    assert len(waits) == 3


def test_a_project_or_zone_that_does_not_exist_is_not_a_deletion():
    message = "ERROR: (gcloud) NOT_FOUND: The resource 'projects/my-projekt' was not found"
    run = scripted({"describe": Done(1, "", message)})
    slices = slices_of(BASE, attempt=1, zone="us-east5-b", run=run)
    for ask in (slices.delete, slices.state):
        with pytest.raises(PodError, match="my-projekt"):
            ask()


def test_a_deletion_that_never_ends_is_told_with_the_command():
    run = scripted({"describe": '{"labels": {"jaxft-run": "run-1"}}', "delete": ""})
    with pytest.raises(PodError, match=r"costs money.*by hand: gcloud compute tpus tpu-vm delete run-1-1 "):
        slices_of(BASE, attempt=1, zone="us-east5-b", run=run, sleep=lambda seconds: None).delete()


def test_hosts_of_a_group_are_ordered_by_their_own_numbers():
    instance = (
        '{"name": "run-1-1-%s", "status": "RUNNING", "labels": {"jaxft-node": "run-1-1"}, '
        '"networkInterfaces": [{"networkIP": "10.0.0.%d"}]%s}'
    )
    by_api = ', "metadata": {"items": [{"key": "worker-id", "value": "1"}]}'
    listed = "[" + instance % ("aaaa", 1, by_api) + "," + instance % ("bbbb", 2, "") + "]"
    # The other host is asked itself.
    answers = {"ssh run-1-1-bbbb": Done(0, "0\n", ""), "instances list": listed}
    request = dataclasses.replace(BASE, topology="v5p:2x2x2")
    workers = slices_of(request, attempt=1, zone="us-east5-b", run=scripted(answers)).workers()
    assert [one.address for one in workers] == ["10.0.0.2", "10.0.0.1"]
    for told, match in ((Done(0, "1\n", ""), "numbered .1., and not from 0 to 1"), (Done(22, "", ""), "does not tell")):
        run = scripted(answers | {"ssh run-1-1-bbbb": told})
        with pytest.raises(PodError, match=match):
            slices_of(request, attempt=1, zone="us-east5-b", run=run).workers()
