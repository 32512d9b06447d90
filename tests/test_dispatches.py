"""What a decode step launches on a GPU, held to what was counted once."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import count_dispatches

# Beyond `KVCache`, per layer and token: without a journal, and with one.
LAUNCHES = {
    **dict.fromkeys(("window", "streaming"), (0, 1)),
    **dict.fromkeys(("tova", "h2o", "vatp", "fade", "keydiff"), (2, 3)),
}


@pytest.fixture(scope="module")
def rows():
    mx.disable_compile()
    try:
        return list(count_dispatches.decode_rows(count_dispatches.make_model(), 16))
    finally:
        mx.enable_compile()


@pytest.mark.parametrize(("policy", "launches"), LAUNCHES.items())
def test_a_step_launches_no_more_than_it_did(rows, policy, launches):
    found = [
        row["launches"]
        for row in rows
        if row["policy"] == policy and row["batch"] == 1 and not row["kv_bits"]
    ]
    assert tuple(found) == launches


@pytest.mark.parametrize("policy", LAUNCHES)
def test_a_batch_launches_no_more_than_that_of_mlx_lm(rows, policy):
    (row,) = (r for r in rows if r["policy"] == policy and r["batch"] > 1)
    # `BatchKVCache` makes a mask for every step, ours only where rows differ.
    assert row["launches"] <= 0


def test_the_count_sees_work_and_no_views():
    def step(x):
        view = x[:, 1:].reshape(3, 2).T[None]
        return [view + 1, mx.softmax(view.astype(mx.float16), axis=-1)]

    trace = count_dispatches.Trace()
    trace.run(step, mx.zeros((2, 4)))
    assert dict(trace.launches) == {"Add": 1, "AsType": 1, "Softmax": 1}


def test_a_view_with_gaps_is_copied_for_a_kernel():
    trace = count_dispatches.Trace()

    def step(x):
        inputs = [x[:1], x[:, :2], x.T, x.reshape(8)]
        shapes = [((2,), mx.float32)]
        return trace.stand_in("kernel", inputs, shapes, contiguous=True)

    trace.run(step, mx.zeros((2, 4)))
    assert dict(trace.launches) == {"kernel": 1, "copy for a kernel": 2}
