"""Who may write to a run directory."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_folder import MemoryFolder, Node

from speechllm.cluster.folder import SharedFolder
from speechllm.cluster.lease import Lease

STALE = 12.0


@pytest.fixture
def folder():
    return MemoryFolder()


def lease(folder: MemoryFolder, token: str) -> Lease:
    return Lease(folder, token, f"job {token}", STALE, clock=lambda: folder.clock)


def may_write(folder: MemoryFolder, name: str, token: str) -> bool:
    """What the trainer asks before it publishes a checkpoint."""
    return (folder.read(name) or "").split("\n")[0] == token


def test_a_new_start_waits_until_the_old_one_gives_it_back(folder):
    old, new = lease(folder, "old"), lease(folder, "new")
    assert old.take() is None
    assert may_write(folder, old.name, "old")
    for _ in range(20):
        folder.clock += 4
        assert old.renew()
        assert "held by job old" in new.take()
    name = old.name
    old.release()
    assert not may_write(folder, name, "old")
    assert new.take() is None
    assert may_write(folder, new.name, "new")


def test_a_dead_holder_is_struck_out_and_can_never_write_again(folder):
    old, new = lease(folder, "old"), lease(folder, "new")
    assert old.take() is None
    folder.clock += STALE
    assert new.take() is not None
    folder.clock += 1
    assert new.take() is None
    assert not may_write(folder, old.name, "old")
    assert not old.renew()
    assert old.take() is not None, "it lines up again"
    assert new.renew()


def test_a_holder_that_slept_long_gives_up_even_if_nobody_took_over(folder):
    holder = lease(folder, "old")
    assert holder.take() is None
    folder.clock += STALE * 0.7
    assert not holder.renew()
    assert holder.take() is not None


def test_release_without_a_lease_is_nothing(folder):
    lease(folder, "x").release()
    assert folder.names() == []


def test_in_a_real_folder(tmp_path):
    folder = SharedFolder(tmp_path)
    old, new = (Lease(folder, token, token, stale_after=60) for token in ("old", "new"))
    assert old.take() is None
    assert new.take() is not None
    assert (tmp_path / old.name).read_text().splitlines()[0] == "old"
    os.utime(tmp_path / old.name, (1, 1))
    assert new.take() is None
    assert not old.renew()
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("access"), st.integers(0, 3), st.integers(1, 15)),
            st.tuples(st.just("advance"), st.just(0), st.integers(1, 10)),
            st.tuples(st.just("kill"), st.integers(0, 3), st.just(0)),
        ),
        max_size=60,
    )
)
def test_under_any_schedule_writers_follow_each_other(schedule):
    """Suspended or killed anywhere: once a newer start has the lease, no older one writes."""
    folder, order, nodes = MemoryFolder(), [], []

    def live(node, token):
        own = Lease(node, token, token, STALE, node.clock)
        while own.take() is not None:
            node.pause()
        held = own.name
        for _ in range(4):
            if not own.renew():
                return
            node.pause()
            if may_write(folder, held, token):
                order.append(int(held))
        own.release()

    for number in range(4):
        nodes.append(Node(folder, lambda node, number=number: live(node, f"t{number}")))
    for what, who, amount in schedule:
        if what == "advance":
            folder.clock += amount
        elif what == "kill":
            nodes[who].kill()
            nodes[who] = Node(folder, lambda node: live(node, f"t{id(node)}"))
        else:
            for _ in range(amount):
                nodes[who].access()
    for node in nodes:
        node.kill()
    assert order == sorted(order)
