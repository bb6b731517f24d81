"""The front of a run against a scripted cloud: every row of the table of endings, capacity, quota, limits, kills."""

import dataclasses
import json
import threading

import pytest
from scripted_cloud import READY, Clock, Cloud, Node, Play

from jaxft.errors import CheckpointError, PodError
from jaxft.pods.attempts.endings import End, classify, next_after
from jaxft.pods.attempts.front import Front, Outside
from jaxft.pods.attempts.launch import Launch, Records
from jaxft.pods.attempts.lead import lead
from jaxft.pods.gcloud import CapacityError
from jaxft.pods.request import Request
from jaxft.pods.slices import Phase, State

REQUEST = Request(
    name="run-1",
    topology="v6e:2x2",
    slices=2,
    zones=("us-east5-b", "us-east1-d"),
    to="gs://bucket/run-1",
    max_hours=8.0,
)
PREEMPTED = State(Phase.LOST, "PREEMPTED")
NO_CAPACITY = CapacityError("us-east5-b gives no machines (capacity): code 8")


@pytest.fixture(autouse=True)
def unflushed(monkeypatch):
    """Fronts are killed here, and never the machine: flushing launch.json took most of the time of these tests."""
    monkeypatch.setattr("os.fsync", lambda file: None)


class World:
    """A front over a scripted cloud. lines: what it has shown."""

    def __init__(self, tmp_path, plays, nodes=(), **options):
        self.clock = Clock()
        self.cloud = Cloud(self.clock, plays, nodes)
        self.lines: list[str] = []
        self.request = dataclasses.replace(REQUEST, **options)
        self.records = Records(tmp_path / "run-1", lambda text: self.cloud.output.write("launch.json", text.encode()))
        archive = tmp_path / "jaxft-abc.tar.gz"
        archive.write_bytes(b"archive")
        self.archive = archive
        self.launch = Launch(
            name="run-1",
            request=self.request.to_json(),
            archive=archive.name,
            config="c",
            hour_usd=21.6,
            created=self.clock.now(),
        )

    def front(self, **outside):
        return Front(
            request=self.request,
            launch=self.launch,
            records=self.records,
            output=self.cloud.output,
            archive=self.archive,
            outside=Outside(
                say=self.lines.append,
                slices_of=self.cloud.slices_of,
                now=self.clock.now,
                sleep=outside.pop("sleep", self.clock.sleep),
                **outside,
            ),
        )

    def lead(self, **outside):
        return lead(self.front(**outside))

    def created(self):
        return [event for event in self.cloud.events if event.startswith("create")]

    def started(self):
        return sorted({event for event in self.cloud.events if event.startswith("start.sh")})


@pytest.mark.parametrize(
    ("exits", "facts", "end"),
    [
        ((0, 0), {}, End.DONE),
        ((2, 69), {}, End.REFUSED),
        ((2, 2), {"hung": True}, End.REFUSED),
        ((75, 75), {}, End.PREEMPTED),
        ((75, 69), {}, End.PREEMPTED),
        ((75, 75), {"stopped": True}, End.STOPPED),
        ((75, 0), {"out_of_time": True}, End.LIMIT),
        ((None, None), {"phase": Phase.LOST}, End.PREEMPTED),
        ((None, 0), {"phase": Phase.ABSENT}, End.PREEMPTED),
        ((69, 69), {}, End.PREEMPTED),
        ((69, 0), {}, End.PREEMPTED),
        ((1, 69), {}, End.FAILED),
        ((69, 137), {}, End.FAILED),
        ((None, 69), {}, End.FAILED),
        ((130, 69), {}, End.FAILED),
        ((75, None), {"hung": True}, End.HUNG),
        ((None, 143), {"hung": True}, End.HUNG),
    ],
)
def test_the_end_of_an_attempt(exits, facts, end):
    assert classify(exits, **facts) is end


@pytest.mark.parametrize("end", End)
def test_only_progress_or_a_lost_node_lead_to_another_attempt(end):
    again = [
        (progress, idle)
        for progress in (True, False)
        for idle in (range(1) if progress else range(1, 5))
        if next_after(end, progress=progress, idle=idle, retries_left=9).retry
    ]
    if end in (End.PREEMPTED, End.BUSY):
        assert again == [(True, 0), (False, 1), (False, 2)]
    else:
        assert again == ([(True, 0)] if end in (End.FAILED, End.HUNG) else [])
    assert not next_after(end, progress=True, idle=0, retries_left=0).retry


def test_one_command_from_creation_to_deletion(tmp_path):
    world = World(tmp_path, [Play(step=9)])
    figures = world.lead()
    assert world.created() == ["create 1 us-east5-b"] and world.cloud.events[-1] == "delete 1"
    assert figures["state"] == "done" and figures["attempts"] == 1 and figures["step"] == 9
    assert not world.cloud.alive
    assert "step 1/9  loss 1.0" in world.lines
    assert set(world.cloud.output.files) >= {"logs/attempt-1/worker-0.log", "logs/attempt-1/worker-1.log"}
    copy = Launch.from_text(world.cloud.output.files["launch.json"].decode(), "copy")
    assert copy == world.records.read() and copy.attempts[0].exits == [0, 0]


def test_each_slice_has_its_watchdog_before_anything_takes_long(tmp_path):
    world = World(tmp_path, [Play(step=9)])
    world.lead()
    events = world.cloud.events
    assert sum(event.startswith("guard.sh") for event in events) == 2
    for worker in "01":
        guard, setup = (
            next(number for number, event in enumerate(events) if event.startswith(f"{script} {worker}"))
            for script in ("guard.sh", "setup.sh")
        )
        assert guard < setup


def test_what_takes_long_on_a_host_is_looked_at_meanwhile(tmp_path, monkeypatch):
    # The watchdog deletes machines at which nobody looks for 20 minutes, and a set-up can take an hour.
    monkeypatch.setattr("jaxft.pods.attempts.hosts.LOOK_SECONDS", 0.01)
    world, looked = World(tmp_path, [Play(step=9)]), threading.Event()
    make = world.cloud.slices_of

    def slow(*arguments, **options):
        slices = make(*arguments, **options)
        ssh = slices.ssh

        def call(worker, argv, **options):
            if argv[1:] and argv[1].endswith("state.sh"):
                looked.set()
            if argv[1:] and argv[1].endswith("setup.sh"):
                looked.clear()
                assert looked.wait(30)
            return ssh(worker, argv, **options)

        slices.ssh = call
        return slices

    world.cloud.slices_of = slow
    assert world.lead()["state"] == "done"


def test_a_refused_config_costs_one_node(tmp_path):
    world = World(tmp_path, [Play(exits=(2, 69), log="jaxft train: data.path is missing\n")])
    with pytest.raises(PodError, match=r"refused: worker 0: jaxft train: data.path is missing"):
        world.lead()
    assert len(world.created()) == 1 and not world.cloud.alive


def test_a_host_that_never_answers_ends_the_run_with_a_mend(tmp_path):
    world = World(tmp_path, [], [Node(silent=1)], keep_minutes=0.0)
    begin = world.clock.time
    with pytest.raises(PodError, match=r"worker 1 .*connection timed out.*No answer over ssh in 10 minutes.*--iap"):
        world.lead()
    assert len(world.created()) == 1 and not world.cloud.alive and world.clock.time - begin < 15 * 60
    assert not any(event.startswith(("setup.sh", "start.sh")) for event in world.cloud.events)


def test_preemptions_go_on_with_progress(tmp_path):
    plays = [Play(lost=PREEMPTED, step=4), Play(lost=PREEMPTED, step=6), Play(step=9)]
    world = World(tmp_path, plays)
    assert world.lead()["step"] == 9
    assert [event for event in world.cloud.events if event.split()[0] in ("create", "delete")] == [
        "create 1 us-east5-b", "delete 1", "create 2 us-east5-b", "delete 2", "create 3 us-east5-b", "delete 3",
    ]  # fmt: skip
    steps = [(attempt.step_before, attempt.step_after) for attempt in world.launch.attempts]
    assert steps == [(None, 4), (4, 6), (6, 9)]


def test_the_third_node_in_a_row_without_progress_is_the_last(tmp_path):
    world = World(tmp_path, [Play(lost=PREEMPTED)] * 5)
    with pytest.raises(PodError, match=r"3 attempts in a row have brought no newer checkpoint.* checkpoint\.every"):
        world.lead()
    assert len(world.created()) == 3 and not world.cloud.alive


def test_after_three_losses_the_next_zone(tmp_path):
    plays = [Play(lost=PREEMPTED, step=step) for step in (1, 2, 3)] + [Play(step=9)]
    world = World(tmp_path, plays)
    world.lead()
    assert [event.split()[2] for event in world.created()] == ["us-east5-b"] * 3 + ["us-east1-d"]


@pytest.mark.parametrize(
    "lost",
    ["REPAIRING", "NOT_FOUND", *(pytest.param(one, marks=pytest.mark.slow) for one in ("STOPPED", "TERMINATED"))],
)
def test_machines_in_any_other_state_are_replaced(tmp_path, lost):
    phase = Phase.ABSENT if lost == "NOT_FOUND" else Phase.LOST
    world = World(tmp_path, [Play(exits=(None, None), lost=State(phase, lost), step=3), Play(step=9)])
    assert world.lead()["nodes"] == 2 and not world.cloud.alive


def test_processes_that_end_before_the_api_says_preempted_are_no_error(tmp_path):
    world = World(tmp_path, [Play(exits=(None, None), lost=PREEMPTED), Play(step=9)])
    make = world.cloud.slices_of

    def late(*arguments, **options):
        slices = make(*arguments, **options)
        is_lost = slices.is_lost
        slices.is_lost = lambda: is_lost() and world.clock.time > world.cloud.begun[1] + 70
        return slices

    world.cloud.slices_of = late
    assert world.lead()["nodes"] == 2


def test_one_wrong_answer_gives_up_no_machines(tmp_path):
    world = World(tmp_path, [Play(step=9)])
    front = world.front()
    states = iter([READY, READY, State(Phase.LOST, "UNKNOWN"), READY])
    make = world.cloud.slices_of

    def wrong_once(*arguments, **options):
        slices = make(*arguments, **options)
        state = slices.state
        slices.state = lambda: next(states, None) or state() if world.cloud.begun else state()
        return slices

    front.outside = dataclasses.replace(front.outside, slices_of=wrong_once)
    assert lead(front)["nodes"] == 1


def test_peers_that_fell_end_as_the_node_does(tmp_path):
    world = World(tmp_path, [Play(exits=(69, 69), step=2), Play(step=9)])
    assert world.lead()["nodes"] == 2


def test_an_error_is_tried_once_more_on_the_same_node_if_there_was_progress(tmp_path):
    world = World(tmp_path, [Play(exits=(1, 69), step=4), Play(exits=(1, 69), step=4)])
    begin = world.clock.time
    with pytest.raises(PodError, match="failed: worker 0: jaxft train: the end"):
        world.lead()
    assert world.created() == ["create 1 us-east5-b"] and len(world.launch.attempts) == 2
    assert world.clock.time - begin > 15 * 60 and not world.cloud.alive
    assert any("keeps node 1" in line for line in world.lines)


def test_an_error_without_progress_is_not_tried_again(tmp_path):
    world = World(tmp_path, [Play(exits=(1, 1))] * 2, keep_minutes=0.0)
    with pytest.raises(PodError, match="brought no newer checkpoint"):
        world.lead()
    assert len(world.launch.attempts) == 1 and not world.cloud.alive


@pytest.mark.parametrize(("log", "minutes"), [("loading\n", 60), ("step 1/9  loss 1.0\n", 30)])
def test_a_hang_is_noticed_and_stopped(tmp_path, log, minutes):
    world = World(tmp_path, [Play(seconds=None, writes=False, log=log)], keep_minutes=0.0)
    begin = world.clock.time
    with pytest.raises(PodError):
        world.lead()
    assert minutes * 60 < world.clock.time - begin < minutes * 60 + 120
    assert [event for event in world.cloud.events if event.startswith(("dump.sh", "stop.sh"))]
    assert not world.cloud.alive


def test_held_chips_are_waited_for_once_and_then_the_node_is_replaced(tmp_path):
    world = World(tmp_path, [Play(busy=True), Play(busy=True), Play(step=9)])
    assert world.lead()["state"] == "done"
    assert [attempt.node for attempt in world.launch.attempts] == [1, 1, 2]


def test_a_zone_without_capacity_leads_to_the_next(tmp_path):
    world = World(tmp_path, [Play(step=9)], [Node(error=NO_CAPACITY), Node()])
    world.lead()
    assert world.created() == ["create 1 us-east5-b", "create 2 us-east1-d"]
    assert any("code 8" in line for line in world.lines)


def test_without_queue_hours_each_zone_is_tried_once(tmp_path):
    world = World(tmp_path, [], [Node(error=NO_CAPACITY)])
    with pytest.raises(PodError, match=r"code 8.*No machines in any zone of --zone \(us-east5-b, us-east1-d\)"):
        world.lead()
    assert len(world.created()) == 2 and world.launch.usd(world.clock.now()) == 0


def test_with_queue_hours_the_zones_are_tried_until_they_are_over(tmp_path):
    world = World(tmp_path, [], [Node(error=CapacityError("429 quota TPUS"))], queue_hours=2.0)
    begin = world.clock.time
    with pytest.raises(PodError, match=r"429 quota TPUS.*2 hours of --queue_hours"):
        world.lead()
    assert 2 < (world.clock.time - begin) / 3600 < 3 and 6 < len(world.created()) < 20


def test_a_queue_is_waited_in(tmp_path):
    waiting = [State(Phase.WAITING, "WAITING_FOR_RESOURCES")] * 40
    world = World(tmp_path, [Play(step=9)], [Node(states=waiting)], queue_hours=1.0)
    assert world.lead()["nodes"] == 1
    assert sum("WAITING_FOR_RESOURCES" in line for line in world.lines) == 1
    assert world.launch.hours(world.clock.now()) < 0.1  # a queue costs nothing


def test_machines_taken_before_they_were_ready_are_no_attempt(tmp_path):
    world = World(tmp_path, [Play(step=9)], [Node(states=[PREEMPTED]), Node()])
    figures = world.lead()
    assert (figures["nodes"], figures["attempts"]) == (2, 1)


def test_a_refused_creation_leaves_nothing(tmp_path):
    world = World(tmp_path, [], [Node(error=PodError("PERMISSION_DENIED"))])
    with pytest.raises(PodError, match="PERMISSION_DENIED"):
        world.lead()
    assert len(world.created()) == 1 and not world.cloud.alive and world.records.read().state == "failed"


def test_the_limit_of_hours_ends_the_run_with_a_save(tmp_path):
    world = World(tmp_path, [Play(seconds=None)], max_hours=2.0)
    with pytest.raises(PodError, match="(?s)limit.*with more, the same command goes on"):
        world.lead()
    assert any(event.startswith("stop.sh") for event in world.cloud.events)
    assert world.launch.hours(world.clock.now()) <= 2.0 and not world.cloud.alive


def test_hours_count_over_all_attempts(tmp_path):
    plays = [Play(seconds=3600, lost=PREEMPTED, step=1), Play(seconds=3600, lost=PREEMPTED, step=2), Play(seconds=None)]
    world = World(tmp_path, plays, max_hours=3.0)
    with pytest.raises(PodError, match="limit"):
        world.lead()
    assert world.launch.hours(world.clock.now()) <= 3.0 and len(world.created()) == 3


def test_the_cost_is_hours_times_price(tmp_path):
    world = World(tmp_path, [Play(seconds=7200, lost=PREEMPTED, step=1), Play(seconds=5400, step=2)])
    world.cloud.delete_seconds = 300.0
    figures = world.lead()
    assert figures["usd"] == pytest.approx((7200 + 5400 + 600) / 3600 * 21.6, rel=0.01)


def test_a_wish_to_stop_saves_and_deletes(tmp_path):
    world = World(tmp_path, [Play(seconds=None)])

    def sleep(seconds):
        world.clock.sleep(seconds)
        if world.cloud.begun:
            world.records.set_wish("stop")

    assert world.lead(sleep=sleep)["state"] == "stopped"
    assert not world.cloud.alive and world.records.wish() is None


def test_a_wish_before_training_creates_nothing_more(tmp_path):
    waiting = [State(Phase.WAITING, "WAITING_FOR_RESOURCES")] * 9
    world = World(tmp_path, [], [Node(states=waiting)])

    def sleep(seconds):
        world.clock.sleep(seconds)
        world.records.set_wish("delete")

    assert world.lead(sleep=sleep)["state"] == "deleted" and not world.cloud.alive


@pytest.mark.parametrize(("answer", "state", "alive"), [("d", "deleted", []), ("l", "open", [1]), ("", "open", [1])])
def test_ctrl_c_asks(tmp_path, answer, state, alive):
    world, questions = World(tmp_path, [Play(seconds=None)]), []

    def sleep(seconds):
        world.clock.sleep(seconds)
        if world.cloud.begun and not questions:
            raise KeyboardInterrupt

    def ask(question):
        questions.append(question)
        return answer

    if answer == "d":
        assert world.lead(sleep=sleep, ask=ask)["state"] == "deleted"
    else:
        with pytest.raises(KeyboardInterrupt):
            world.lead(sleep=sleep, ask=ask)
        assert any("jaxft pod delete run-1" in line for line in world.lines)
    assert "USD 21.60 an hour" in questions[0]
    assert world.records.read().state == state and list(world.cloud.alive) == alive


def test_ctrl_c_without_a_terminal_leaves_the_run(tmp_path):
    world = World(tmp_path, [Play(seconds=None)])

    def sleep(seconds):
        if world.cloud.begun:
            raise KeyboardInterrupt
        world.clock.sleep(seconds)

    with pytest.raises(KeyboardInterrupt):
        world.lead(sleep=sleep)
    assert list(world.cloud.alive) == [1] and any("is left as it is" in line for line in world.lines)


def test_detach_leaves_after_the_start_and_the_same_command_takes_it_up(tmp_path):
    world = World(tmp_path, [Play(step=9)], detach=True)
    assert world.lead()["state"] == "open" and list(world.cloud.alive) == [1]
    world.request = dataclasses.replace(world.request, detach=False)
    world.launch = world.records.read()
    assert world.lead()["state"] == "done"
    assert len(world.created()) == 1 and world.started() == ["start.sh 0 1", "start.sh 1 1"]


class Killed(BaseException):
    """The front is killed: nothing after it runs."""


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_a_front_killed_at_any_call_makes_nothing_twice(tmp_path, before, stride):
    plays = [Play(lost=PREEMPTED, step=4), Play(step=9)]
    at = 0
    while True:
        at += stride
        world = World(tmp_path / str(at), plays) if (tmp_path / str(at)).mkdir() is None else None
        count, make = 0, world.cloud.slices_of

        def counted(*arguments, _make=make, _at=at, **options):
            slices = _make(*arguments, **options)

            def killing(call):
                def wrapped(*arguments, **options):
                    nonlocal count
                    count += 1
                    if count == _at and before:
                        raise Killed
                    result = call(*arguments, **options)
                    if count == _at and not before:
                        raise Killed
                    return result

                return wrapped

            for name in ("create", "state", "ssh", "copy", "fetch", "delete"):
                setattr(slices, name, killing(getattr(slices, name)))
            return slices

        world.cloud.slices_of = counted
        killed = False
        try:
            world.lead()
        except Killed:
            killed = True
            world.cloud.slices_of = make
            world.launch = world.records.read()
            assert world.lead()["state"] == "done"
        assert not world.cloud.alive and world.launch.state == "done"
        assert [len({*world.created()}), len(world.created())] == [2, 2], world.cloud.events
        if not killed:
            break
    assert at > 60


def test_an_api_that_does_not_answer_decides_nothing(tmp_path):
    world = World(tmp_path, [Play(seconds=600, step=9)])
    front = world.front()
    make = world.cloud.slices_of

    def silent(*arguments, **options):
        slices = make(*arguments, **options)
        state = slices.state

        def answer():
            if world.cloud.begun and world.clock.time - world.cloud.begun[1] < 300:
                raise PodError("no network")
            return state()

        slices.state = answer
        return slices

    front.outside = dataclasses.replace(front.outside, slices_of=silent)
    assert lead(front)["nodes"] == 1
    assert sum("no network" in line for line in world.lines) == 1


def test_a_damaged_launch_names_the_mend(tmp_path):
    world = World(tmp_path, [])
    world.records.save(world.launch)
    path = world.records.folder / "launch.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match=r"damaged.*jaxft pod list.*jaxft pod delete"):
        world.records.read()
    path.write_text(json.dumps({"form": 99}))
    with pytest.raises(CheckpointError, match="another version of jaxft"):
        world.records.read()
