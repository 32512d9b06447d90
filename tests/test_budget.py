"""A limit in bytes: what all caches reach stays within it, and uses it."""

import itertools

import pytest
import tiny
import zoo

from tova_mlx import POLICIES, convert, describe, make_prompt_cache
from tova_mlx.errors import OptionError
from tova_mlx.models import budget
from tova_mlx.models.budget import Budget, parse_size
from tova_mlx.models.conversion import bytes_at_most, tokens_within

BOUNDED = [name for name in POLICIES if name != "full"]
BITS = [None, 8, 4, (8, 4), (4, 4)]
# Of the tiny model, for limits of 12 to 250 tokens, bits or not.
BUDGETS = [60_000 + 7_001 * i for i in range(10)]
READ = 600


@pytest.fixture(scope="module")
def model():
    return tiny.make(n_heads=4, n_kv_heads=2, head_dim=32)


def held(caches):
    return sum(c.nbytes for c in caches)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1024", 1024),
        (" 7 ", 7),
        ("-1", -1),
        (7, 7),
        (None, None),
        (1.5, 1.5),
        ("2GB", Budget("2GB", 2 * 10**9)),
        ("2 gb", Budget("2 gb", 2 * 10**9)),
        ("1.5MiB", Budget("1.5MiB", 3 * 2**19)),
        ("0.5kB", Budget("0.5kB", 500)),
        ("auto", Budget("auto", None)),
        ("Auto ", Budget("auto", None)),
    ],
)
def test_a_size_is_tokens_or_bytes(text, want):
    assert parse_size(text) == want


@pytest.mark.parametrize(
    "text", ["", "GB", "3 parsecs", "-1GB", "1e3MB", "2GBs", "nan", "2 G B", "1,5GB"]
)
def test_what_is_no_size_is_refused(text, model):
    with pytest.raises(OptionError, match=r"is not a size\. Use a number of tokens"):
        make_prompt_cache(model, text)


def test_more_than_the_machine_has_is_refused():
    with pytest.raises(OptionError, match="more than the"):
        parse_size("9999TB")


@pytest.mark.parametrize(
    ("policy", "bits", "nbytes"),
    [
        (policy, bits, BUDGETS[i % len(BUDGETS)])
        for i, (policy, bits) in enumerate(itertools.product(BOUNDED, BITS))
    ],
)
def test_all_caches_stay_within_a_budget_and_use_it(model, policy, bits, nbytes):
    how = {"policy": policy, "kv_bits": bits, "kv_group_size": 32}
    caches = make_prompt_cache(model, f"{nbytes / 1000}kB", **how)
    tiny.feed(model, tiny.tokens(READ), caches, [READ - 20, *[1] * 20])
    assert 0.9 * nbytes < held(caches) <= nbytes
    # The journal is full, too.
    assert held(caches) == describe(caches).totals["bytes_at_most"]
    assert all(c.can_trim(16) for c in caches)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("policy", ["tova", "fade", "streaming"])
def test_rows_of_a_batch_share_a_budget(model, policy, bits):
    nbytes = 250_000
    how = {"policy": policy, "kv_bits": bits, "kv_group_size": 32, "journal": 0}
    convert(model, "250kB", rows=3, **how)
    single = [model.make_cache() for _ in range(3)]
    for caches in single:
        tiny.feed(model, tiny.tokens(READ), caches, READ)
    batch = [layer[0].merge(layer) for layer in zip(*single, strict=True)]
    del single
    tiny.feed(model, tiny.tokens(30, batch=3), batch, 1)
    assert 0.9 * nbytes < held(batch) <= nbytes


@pytest.mark.parametrize("policy", BOUNDED)
def test_too_little_is_refused_with_the_least_that_works(model, policy):
    with pytest.raises(OptionError, match="is too small") as caught:
        make_prompt_cache(model, "0.1kB", policy=policy)
    least = int(
        str(caught.value).split("at least ")[1].split(" bytes")[0].replace(",", "")
    )
    fit = tokens_within(model, Budget("", least), policy=policy)
    assert bytes_at_most(model, fit.tokens, policy=policy) <= least
    with pytest.raises(OptionError, match="is too small"):
        tokens_within(model, Budget("", least - 1), policy=policy)


def test_the_least_counts_what_is_protected(model):
    how = {"policy": "tova", "n_sinks": 10, "n_recent": 20}
    with pytest.raises(OptionError, match="for 31 tokens per layer"):
        make_prompt_cache(model, "1kB", **how)
    # Options that no size makes right are said, not a size.
    with pytest.raises(OptionError, match="n_sinks"):
        make_prompt_cache(model, "1MB", n_sinks=-1)


def test_full_has_no_budget(model):
    with pytest.raises(OptionError, match="does not bound"):
        make_prompt_cache(model, "1MB", policy="full")


def test_layers_that_bound_themselves_count():
    # Two of its four layers have sliding windows of mlx-lm's.
    model = zoo.make("gemma3")
    caches = make_prompt_cache(model, "100kB")
    tiny.feed(model, tiny.tokens(READ), caches, READ)
    assert describe(caches).totals["bytes_at_most"] <= 100_000
    kinds = {type(c).__name__ for c in caches}
    assert kinds == {"TOVACache", "RotatingKVCache"}


def test_auto_is_nine_tenths_of_what_is_free_but_for_a_step(model, monkeypatch):
    monkeypatch.setattr(budget, "_free_memory", lambda: 10**9)
    fit = tokens_within(model, parse_size("auto"), step=512)
    # Its widest matrix: four heads of 32 from 32, in float32.
    widest = 128 + 32
    assert fit.nbytes == int(0.9 * (10**9 - 4 * 512 * widest * 4))
    assert fit.line.startswith(
        "auto: 90 % of (1.00 GB free memory - 0.00 GB for a step"
    )
    assert bytes_at_most(model, fit.tokens) <= fit.nbytes
    monkeypatch.setattr(budget, "_free_memory", lambda: 1000)
    with pytest.raises(OptionError, match="'auto' is too small"):
        make_prompt_cache(model, "auto")


def test_what_is_free_is_within_a_container(monkeypatch, tmp_path):
    real = budget.Path
    files = {"memory.max": "5000000\n", "memory.current": "2000000\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(
        budget, "Path", lambda p: tmp_path if p == "/sys/fs/cgroup" else real(p)
    )
    assert budget._free_memory() == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert budget._free_memory() > 3_000_000
