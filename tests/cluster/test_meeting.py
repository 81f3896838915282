"""The meeting under every schedule that hypothesis can think of, and its plain cases by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from simulated_folder import MemoryFolder, Node

from speechllm.cluster.folder import SharedFolder
from speechllm.cluster.group import AGAIN, PERSON, Generation, Member, Result, agree_on
from speechllm.cluster.lease import Lease
from speechllm.cluster.meeting import Agreed, Meeting, Rules, Waiting

STALE = 12.0


class OpenGate:
    port = 1234

    def take(self) -> str | None:
        return None

    def give_back(self) -> None: ...


class LeaseGate(OpenGate):
    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def take(self) -> str | None:
        return self.lease.take()

    def give_back(self) -> None:
        self.lease.release()


@dataclass
class World:
    """Nodes that meet, train until someone is gone, and leave; and what may never be seen."""

    nodes: int
    min_nodes: int
    folder: MemoryFolder = field(default_factory=MemoryFolder)
    living: list[Node] = field(default_factory=list)
    tasks: dict[int, int] = field(default_factory=dict)  # of id(node)
    training: dict[int, Generation] = field(default_factory=dict)
    agreed: dict[int, Generation] = field(default_factory=dict)
    published: list[int] = field(default_factory=list)  # generations, as they wrote checkpoints
    starts: int = 0
    timeout: float = 1e9
    lease_stale_after: float = STALE

    def rules(self) -> Rules:
        return Rules(self.nodes, self.min_nodes, self.timeout, settle=6.0, stale_after=STALE)

    def start(self, task: int) -> Node:
        self.starts += 1
        token = f"start{self.starts}"
        node = Node(self.folder, lambda node: self._live(node, task, token))
        self.living.append(node)
        self.tasks[id(node)] = task
        return node

    def _live(self, node: Node, task: int, token: str) -> None:
        where = PrefixedFolder(node, "lease")
        lease = Lease(where, token, f"task {task}", self.lease_stale_after, node.clock)
        me = Member(task, token, f"host{task}", f"10.0.0.{task}")
        meeting = Meeting(node, me, self.rules(), LeaseGate(lease), node.clock)
        while isinstance(state := meeting.step(), Waiting):
            if lease.name is not None and not lease.renew():
                state = Result(AGAIN, "lost the lease")
                break
            node.pause()
        if isinstance(state, Result):
            meeting.leave()
            return
        group = state.generation
        known = self.agreed.setdefault(group.number, group)
        assert known == group, "two member lists for one generation"
        for member in group.members:
            assert f"generation_{group.number:06d}.agreed.{member.token}" in self.folder.files
        self.training[id(node)] = group
        while (result := meeting.watch(group)) is None:
            if group.master.token == token:
                assert lease.name is not None
                if not lease.renew():
                    result = Result(AGAIN, "lost the lease")
                    break
                if self.folder.read(f"lease.{lease.name}").split("\n")[0] == token:
                    self.published.append(group.number)
            node.pause()
        del self.training[id(node)]
        while meeting.conclude(group, result) is None:
            node.pause()
        meeting.leave()

    def kill(self, node: Node) -> None:
        node.kill()
        self.training.pop(id(node), None)
        self.living.remove(node)

    def access(self, node: Node) -> None:
        node.access()
        if not node.alive:
            self.living.remove(node)

    def advance(self, seconds: float, *, punctual: bool) -> None:
        """punctual: no node lets more than half of `stale_after` pass between signs of life."""
        for node in list(self.living) if punctual else []:
            for _ in range(200):
                if not node.alive or self.folder.clock + seconds - node.touched <= STALE / 2:
                    break
                self.access(node)
        self.folder.clock += seconds

    def generations(self) -> set[int]:
        return {group.number for group in self.training.values()}

    def is_whole(self) -> bool:
        """A group trains, and none of it is missing."""
        groups = list(self.training.values())
        return bool(groups) and len(groups) == len(groups[0].members) >= self.min_nodes

    def run_fairly(self, *, restart: bool = True) -> None:
        """One second: everyone makes some accesses; who left comes back, as a scheduler does."""
        for _ in range(16):
            for node in list(self.living):
                if node.alive:
                    self.access(node)
        if restart:
            running = {self.tasks[id(node)] for node in self.living}
            for task in set(range(1, self.nodes + 1)) - running:
                self.start(task)
        self.advance(1.0, punctual=True)

    def stop(self) -> None:
        for node in list(self.living):
            self.kill(node)


class PrefixedFolder:
    """A second folder inside the one of the simulation."""

    def __init__(self, node: Node, prefix: str) -> None:
        self.node, self.prefix = node, prefix + "."

    def names(self) -> list[str]:
        names = self.node.names()
        return [n.removeprefix(self.prefix) for n in names if n.startswith(self.prefix)]

    def read(self, name: str) -> str | None:
        return self.node.read(self.prefix + name)

    def write(self, name: str, text: str) -> None:
        self.node.write(self.prefix + name, text)

    def publish(self, name: str, text: str) -> bool:
        return self.node.publish(self.prefix + name, text)

    def touch(self, name: str) -> float:
        return self.node.inner.touch(self.prefix + name)

    def time_of(self, name: str) -> float | None:
        return self.node.time_of(self.prefix + name)

    def remove(self, name: str) -> None:
        self.node.remove(self.prefix + name)


# who: (what, which node or task, how much)
events = st.lists(
    st.one_of(
        st.tuples(st.just("access"), st.integers(0, 5), st.integers(1, 40)),
        st.tuples(st.just("access"), st.integers(0, 5), st.integers(1, 5)),
        st.tuples(st.just("fair"), st.just(0), st.integers(1, 20)),
        st.tuples(st.just("advance"), st.just(0), st.integers(1, 6)),
        st.tuples(st.just("kill"), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("start"), st.integers(1, 4), st.just(0)),
    ),
    max_size=60,
)


def play(world: World, schedule: list[tuple[str, int, int]], *, punctual: bool) -> None:
    for what, who, amount in schedule:
        node = world.living[who % len(world.living)] if world.living else None
        if what == "start":
            task = (who - 1) % world.nodes + 1
            twins = [n for n in world.living if world.tasks[id(n)] == task]
            if len(twins) < 2:  # `qmod -rj`: the new one starts before the old one ends
                world.start(task)
        elif what == "fair":
            for _ in range(amount):
                world.run_fairly(restart=False)
        elif what == "advance":
            world.advance(float(amount), punctual=punctual)
        elif node is not None and what == "kill":
            world.kill(node)
        elif node is not None:
            for _ in range(amount):
                if node.alive:
                    world.access(node)
                    if punctual:
                        assert len(world.generations()) <= 1, "two generations train at a time"
        if punctual:
            assert len(world.generations()) <= 1, "two generations train at a time"
    assert world.published == sorted(world.published), "an old generation wrote after a new one"


sizes = st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (4, 4)])


@settings(max_examples=60, deadline=None, phases=[Phase.generate])
@given(size=sizes, schedule=events)
def test_no_two_generations_train_and_all_who_live_meet_in_the_end(size, schedule):
    # Twice: renewals are not what the schedule keeps punctual.
    world = World(*size, lease_stale_after=2 * STALE)
    try:
        for task in range(1, world.nodes + 1):
            world.start(task)
        play(world, schedule, punctual=True)
        for _ in range(15 * int(STALE)):
            world.run_fairly()
            assert len(world.generations()) <= 1, "two generations train at a time"
            if world.is_whole():
                break
        assert world.is_whole(), "no progress though all are there"
        # Those who train stay together when nothing happens.
        before = dict(world.training)
        for _ in range(2 * int(STALE)):
            world.run_fairly()
        assert world.training.items() >= before.items()
    finally:
        world.stop()


@settings(max_examples=100, deadline=None, phases=[Phase.generate])
@given(size=sizes, schedule=events)
def test_nodes_that_sleep_long_still_agree_and_never_write_after_another(size, schedule):
    """Suspended for any time in the middle of anything: two may think that they run, for the one
    moment until they look, but only the newest can write."""
    world = World(*size)
    try:
        for task in range(1, world.nodes + 1):
            world.start(task)
        play(world, schedule * 2, punctual=False)
    finally:
        world.stop()


def settle(world: World, seconds: int, *, restart: bool = False) -> None:
    for _ in range(seconds):
        world.run_fairly(restart=restart)


@pytest.fixture
def pair():
    world = World(2, 2)
    yield world
    world.stop()


def test_two_meet_with_ranks_in_the_order_of_their_tasks(pair):
    pair.start(2)
    pair.start(1)
    settle(pair, 4)
    (group,) = set(pair.training.values())
    assert [member.task for member in group.members] == [1, 2]
    assert group.master.address == "10.0.0.1"
    assert len(pair.training) == 2


def test_when_one_dies_the_other_leaves_and_they_meet_again(pair):
    first = pair.start(1)
    pair.start(2)
    settle(pair, 4)
    pair.kill(first)
    settle(pair, int(STALE) - 3)
    assert len(pair.training) == 1, "not given up before stale_after"
    settle(pair, 7)
    assert not pair.training
    settle(pair, 6, restart=True)
    assert pair.generations() == {2}
    assert len(pair.training) == 2


def test_a_smaller_group_goes_on_where_min_nodes_allows():
    world = World(3, 2)
    third = [world.start(task) for task in (1, 2, 3)][2]
    settle(world, 4)
    assert len(world.training) == 3
    world.kill(third)
    settle(world, int(STALE) + 6)
    world.start(1), world.start(2)
    settle(world, 4)
    assert not world.training, "the third gets time to come"
    settle(world, 8)
    assert [len(group.members) for group in world.training.values()] == [2, 2]
    world.stop()


def test_a_record_of_a_killed_start_is_not_met(pair):
    pair.kill(pair.start(2))
    dead = pair.start(2)
    for _ in range(16):
        dead.access()
    pair.kill(dead)
    pair.start(1)
    settle(pair, int(STALE) + 5)
    assert not pair.training
    assert pair.folder.read("generation_000001.decision").startswith("abort")
    pair.start(2)
    settle(pair, 5)
    assert pair.generations() == {2}


def test_a_new_start_waits_for_the_old_group_to_end(pair):
    old = [pair.start(1), pair.start(2)]
    settle(pair, 4)
    pair.start(1), pair.start(2)
    settle(pair, 3 * int(STALE))
    assert pair.generations() == {1}
    for node in old:
        pair.kill(node)
    settle(pair, int(STALE) + 6)
    assert pair.generations() == {2}
    assert len(pair.training) == 2


def test_patience_ends_with_a_reason_that_names_who_is_missing():
    folder = MemoryFolder()
    clock = [0.0]
    rules = Rules(3, 2, timeout=300, settle=60, stale_after=STALE)
    meeting = Meeting(
        folder, Member(2, "a", "node7", "10.0.0.7"), rules, OpenGate(), lambda: clock[0]
    )
    while isinstance(state := meeting.step(), Waiting):
        clock[0] += 1
        folder.clock = clock[0]
    assert isinstance(state, Result)
    assert state.code == AGAIN
    assert "waited 300 s" in state.reason
    assert "1 of 3 nodes are here (task 2 on node7); missing: task 1, 3" in state.reason
    meeting.leave()
    assert folder.names() == []


def test_a_member_that_was_suspended_leaves_by_itself():
    folder, clock = MemoryFolder(), [0.0]
    rules = Rules(1, 1, timeout=300, settle=6, stale_after=STALE)
    meeting = Meeting(folder, Member(1, "a", "h", "1"), rules, OpenGate(), lambda: clock[0])
    while not isinstance(state := meeting.step(), Agreed):
        pass
    assert meeting.watch(state.generation) is None
    clock[0] += STALE * 0.7
    result = meeting.watch(state.generation)
    assert result is not None
    assert result.code == AGAIN
    assert "no sign of life" in result.reason


ONE, TWO, THREE = (Member(n, f"t{n}", f"h{n}", "") for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("results", "code", "words"),
    [
        ({ONE: Result(0, ""), TWO: Result(0, "")}, 0, "done"),
        ({ONE: Result(1, "bug"), TWO: None}, AGAIN, "task 2 on h2 died"),
        ({ONE: Result(1, "bug"), TWO: Result(PERSON, "bad key")}, PERSON, "h2: bad key"),
        ({ONE: None, TWO: Result(PERSON, "bad key")}, PERSON, "bad key"),
        ({ONE: Result(1, "x", False), TWO: Result(1, "bug")}, 1, "task 2 on h2: bug"),
        ({ONE: Result(1, "bug"), TWO: Result(AGAIN, "saved")}, AGAIN, "saved"),
    ],
)
def test_one_end_for_the_whole_group(results, code, words):
    end = agree_on(results)
    assert end.code == code
    assert words in end.reason
    assert agree_on(dict(reversed(results.items()))) == end


def test_a_failure_is_concluded_alike_by_all():
    """One crashes, the other is told so; both wait for the third, which is dead: again."""
    folder, clock = MemoryFolder(), [0.0]
    rules = Rules(3, 3, timeout=300, settle=6, stale_after=STALE)
    meetings = [
        Meeting(folder, Member(n, f"t{n}", f"h{n}", ""), rules, OpenGate(), lambda: clock[0])
        for n in (1, 2, 3)
    ]
    states = []
    while not all(isinstance(state, Agreed) for state in states) or not states:
        states = [meeting.step() for meeting in meetings]
    group = states[0].generation
    crash = Result(1, "connection reset")
    assert meetings[0].conclude(group, crash) is None
    told = meetings[1].watch(group)
    assert told is not None
    assert (told.code, told.cause) == (1, False)
    assert meetings[1].conclude(group, told) is None
    for _ in range(int(STALE) + 1):
        clock[0] += 1
        folder.clock = clock[0]
        ends = [meetings[0].conclude(group, crash), meetings[1].conclude(group, told)]
    assert ends[0] == ends[1] == Result(AGAIN, "task 3 on h3 died")


def test_in_a_real_folder(tmp_path):
    rules = Rules(2, 2, timeout=300, settle=6, stale_after=60)
    meetings = [
        Meeting(SharedFolder(tmp_path), Member(n, f"t{n}", "same", "127.0.0.1"), rules, OpenGate())
        for n in (1, 2)
    ]
    for _ in range(6):
        states = [meeting.step() for meeting in meetings]
    assert isinstance(states[0], Agreed)
    assert states[0] == states[1]
    group = states[0].generation
    assert [group.rank_of(meeting.me) for meeting in meetings] == [0, 1]
    assert meetings[0].conclude(group, Result(AGAIN, "saved")) == Result(AGAIN, "saved")
    meetings[0].leave()
    assert meetings[1].watch(group) is None, "the other one is about to have saved, too"
    assert meetings[1].conclude(group, Result(AGAIN, "saved")) == Result(AGAIN, "saved")
    meetings[1].leave()
    proposal = json.loads((tmp_path / "generation_000001.json").read_text())
    assert proposal["port"] == 1234
    assert not [name for name in SharedFolder(tmp_path).names() if name.startswith("member")]
