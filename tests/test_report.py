import json

import tiny
import zoo

from tova_mlx import describe, make_prompt_cache


def test_rows_say_what_each_layer_holds():
    model = tiny.make()
    caches = make_prompt_cache(model, 16, policy="fade")
    tiny.feed(model, tiny.tokens(50), caches, [29] + [1] * 21)
    report = describe(caches)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    row = report.rows[1]
    assert (row.layer, row.policy, row.tokens_held, row.tokens_seen) == (
        1,
        "fade",
        16,
        50,
    )
    assert row.bytes_now == caches[1].nbytes == row.bytes_at_most
    assert report.totals["bytes_now"] == sum(c.nbytes for c in caches)
    table = str(report).splitlines()
    assert len(table) == 1 + 3 + 1
    assert "PolicyKVCache" in table[1]


def test_a_model_is_described_by_the_caches_it_makes():
    report = describe(tiny.make())
    assert [r.kind for r in report.rows] == ["KVCache"] * 3
    assert report.totals["bytes_at_most"] is None


def test_a_layer_with_several_caches_is_one_row():
    model = zoo.make("falcon_h1")
    caches = make_prompt_cache(model, 16)
    tiny.feed(model, tiny.tokens(40), caches, 8)
    row = describe(caches).rows[0]
    assert row.kind == "ArraysCache + TOVACache"
    assert (row.policy, row.tokens_held, row.tokens_seen) == ("tova", 16, 40)
    assert row.bytes_now == caches[0].nbytes <= row.bytes_at_most
