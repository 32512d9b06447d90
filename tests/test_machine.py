"""A share of the state machines, and the sequences that once failed.

scripts/state_machine.py runs the machines for as long as one likes.
"""

import machine
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from machine import BatchMachine, CacheMachine, Rows, Setup, World
from test_kernels import kernels_run  # noqa: F401


def run(kind, examples, steps=14):
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_cache_is_right_whatever_is_done_to_it():
    run(CacheMachine, 250)


def test_a_batch_is_right_whatever_is_done_to_it():
    run(BatchMachine, 120)


@pytest.mark.parametrize("kind", [CacheMachine, BatchMachine])
def test_so_it_is_where_kernels_evict(kernels_run, monkeypatch, kind):  # noqa: F811
    # One kind of heads: each other one would be compiled anew.
    batches = (1, 1, 2) if kind is CacheMachine else (1,)
    monkeypatch.setattr(kind, "drawn", machine.setups(batches, heads=(4, 2)))
    run(kind, 20, steps=8)
    assert kernels_run


POLICIES = ["window", "streaming", "h2o", "tova", "fade", "keydiff"]


def world(policy, **how):
    options = {"n_sinks": 1} if policy == "streaming" else {}
    return World(Setup(policy, max_size=4, options=tuple(options.items()), **how))


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_taken_back(policy):
    w = world(policy)
    w.read(9)
    w.decode(3)
    w.trim(0)
    w.trim(-3)
    w.check()
    w.decode(2)
    w.check()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", ["kernels", "portable"])
def test_all_taken_back(policy, where, request):
    if where == "kernels":
        request.getfixturevalue("kernels_run")
    w = world(policy)
    w.read(2)
    w.trim(2)
    w.check()
    w.decode(6)
    w.check()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("where", ["before", "update", "between", "inside", "after"])
def test_failed_and_taken_back(policy, where):
    w = world(policy)
    w.read(7)
    for layer in (0, 1):
        w.interrupt(2, layer, where, "trim")
        w.check()
        w.decode(1)
    w.check()


def test_a_step_before_the_first_eviction_leaves_nothing_waiting():
    options = (("memory", 0.0), ("value_weighted", True))
    for setup in (Setup("keydiff", 9), Setup("tova", 9, options)):
        w = World(setup)
        w.decode(6)
        w.check()


def test_rows_of_padding_only():
    rows = Rows(Setup("tova", 4, kv_bits=8), [3, 5])
    rows.padded([0, 7], 3, "left")
    rows.check()
    rows.padded([6, 0], 1, "right")
    rows.step()
    rows.check()


def test_a_renumbering_before_a_file_was_written_is_not_taken_back():
    w = World(Setup("window", max_size=1, period=1))
    w.decode(2)
    w.store("state")
    w.decode(3)
    w.trim(4)
    w.check()


def test_a_victim_that_comes_back_has_its_own_position():
    w = World(Setup("window", max_size=1, period=1))
    w.decode(2)
    w.trim(1)
    w.check()


def test_rows_of_a_chunk_in_parts_have_masks_of_their_own():
    w = World(Setup("window", max_size=1, period=3, batch=2))
    w.read(4, "bool")
    w.check()
