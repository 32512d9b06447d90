"""A policy from outside: the example of docs/adding-a-policy.md, whole."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

from tova_mlx import (
    POLICIES,
    Policy,
    PolicyKVCache,
    load_prompt_cache,
    make_prompt_cache,
    register_policy,
    save_prompt_cache,
)
from tova_mlx.caches.batch import BatchPolicyKVCache
from tova_mlx.errors import CacheStateError, OptionError
from tova_mlx.policies import registry
from tova_mlx.storage.affine import Affine

ROOT = Path(__file__).parents[1]
DOC = ROOT / "docs" / "adding-a-policy.md"
BLOCK = r"<!-- value_norm.py -->\n```python\n(.*?)```"
ENTRY = "[tova_mlx.policies]\nvalue-norm = value_norm:VALUE_NORM\n"
NAME = "value-norm"


def example():
    return re.search(BLOCK, DOC.read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.fixture
def registered():
    scope = {}
    exec(example(), scope)
    yield scope["VALUE_NORM"]
    POLICIES._registered.pop(NAME)


@pytest.fixture
def installed(tmp_path):
    """A directory with a package that has the example as an entry point."""
    code = "".join(s for s in example().splitlines(True) if "register_policy" not in s)
    code = code.replace(
        "import mlx.core", "from tova_mlx import Policy\nimport mlx.core"
    )
    (tmp_path / "value_norm.py").write_text(code, encoding="utf-8")
    info = tmp_path / "value_norm-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: value-norm\nVersion: 1\n"
    )
    (info / "entry_points.txt").write_text(ENTRY)
    return tmp_path


def run(path, *arguments):
    # What python -c imports comes before the installed package of the tests.
    others = os.environ.get("PYTHONPATH", str(ROOT))
    return subprocess.run(
        [sys.executable, "-m", "tova_mlx", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{others}"},
        capture_output=True,
        text=True,
    )


def test_it_is_short():
    assert len(example().splitlines()) <= 25


def expected(values, size, n_recent, per_head):
    """Positions held [H'][size], token by token, from the rule alone."""
    norms = np.linalg.norm(values.astype(np.float64), axis=-1)
    norms = norms if per_head else norms.mean(axis=0, keepdims=True)
    result = []
    for head in norms:
        held = []
        for t in range(len(head)):
            held.append(t)
            if len(held) > size:
                free = [p for p in held if p <= t - n_recent]
                held.remove(min(free, key=lambda p: (head[p], p)))
        result.append(held)
    return result


@pytest.mark.parametrize("kv_bits", [None, 8])
@pytest.mark.parametrize("granularity", ["layer", "head"])
@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_it_holds_what_the_rule_says(registered, chunk, granularity, kv_bits):
    values = np.random.default_rng(3).normal(size=(2, 60, 32)).astype(np.float32)
    cache = PolicyKVCache(
        12, NAME, granularity=granularity, kv_bits=kv_bits, kv_group_size=32
    )
    for start in range(0, 60, chunk):
        v = mx.array(values[None, :, start : start + chunk])
        stored = cache.update_and_fetch(mx.ones(v.shape), v)
        q = mx.zeros((1, 4, *v.shape[2:]))
        mx.eval(cache.attend(q, *stored, scale=1.0, mask=cache.make_mask(v.shape[2])))
    if kv_bits is not None:
        # A policy reads what is stored.
        stored = Affine(kv_bits, 32).quantize(mx.array(values[None]))
        values = np.array(stored.dequantized()[0])
    want = expected(values, 12, 3, granularity == "head")
    assert np.array(cache.positions)[0].tolist() == want


@pytest.mark.parametrize("options", [{}, {"granularity": "head"}, {"kv_bits": 8}])
def test_it_keeps_the_contract(registered, options, tmp_path):
    if "kv_bits" in options:
        options = {**options, "kv_group_size": 32}
    model = tiny.make(head_dim=32) if options.get("kv_bits") else tiny.make()
    # Each token once: of the same token twice the first layer's values are the same.
    tokens = mx.random.permutation(tiny.VOCABULARY)[None, :50]
    logits, held = [], []
    for chunk in (1, 7, 50):
        caches = make_prompt_cache(model, 12, policy=NAME, **options)
        logits.append(tiny.feed(model, tokens, caches, chunk))
        held.append([np.array(c.positions) for c in caches])
    for other, positions in zip(logits[1:], held[1:], strict=True):
        near = 2e-2 if options.get("kv_bits") else 1e-4
        assert mx.abs(other - logits[0]).max() < near
        assert all(map(np.array_equal, positions, held[0]))
    # Saved, and gone on to the bit.
    path = save_prompt_cache(tmp_path / "prompt", caches)
    loaded, _ = load_prompt_cache(path)
    more = tiny.tokens(5, seed=3)
    again = tiny.feed(model, more, loaded, 1)
    assert mx.array_equal(again, tiny.feed(model, more, caches, 1))


def test_rows_of_a_batch_are_what_they_are_alone(registered):
    model = tiny.make()
    alone, rows = [], []
    for length in (5, 12, 30):
        caches = make_prompt_cache(model, 12, policy=NAME)
        tiny.feed(model, tiny.tokens(length, seed=length), caches, length)
        rows.append(caches)
        twin = make_prompt_cache(model, 12, policy=NAME)
        tiny.feed(model, tiny.tokens(length, seed=length), twin, length)
        alone.append(twin)
    batch = [BatchPolicyKVCache.merge(list(layer)) for layer in zip(*rows, strict=True)]
    steps = mx.concatenate([tiny.tokens(20, seed=s) for s in (1, 2, 3)])
    got = tiny.feed(model, steps, batch, 1)
    for i, caches in enumerate(alone):
        want = tiny.feed(model, steps[i : i + 1], caches, 1)
        assert mx.abs(got[i] - want[0]).max() < 1e-4
        for layer, cache in zip(batch, caches, strict=True):
            assert np.array_equal(layer.extract(i).positions, cache.positions)


def test_an_installed_package_brings_it(installed, demo_path, tmp_path):
    text = ROOT / "scripts" / "moby_dick_excerpt.txt"
    done = run(
        installed,
        *("eval", "perplexity", text, "--policy", NAME, "--max-kv-size", 64),
        *("--tokens", 300, "--context", 150, "--out", tmp_path / "out", "--json"),
        *("--model", demo_path),
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    values = {row["policy"]: row["value"] for row in rows}
    assert values[NAME] > values["full"]
    listed = run(installed, "generate", "--help")
    assert NAME in listed.stdout


def test_a_prompt_of_a_policy_that_is_not_there_is_refused_by_name(tmp_path):
    scope = {}
    exec(example(), scope)
    caches = make_prompt_cache(model := tiny.make(), 12, policy=NAME)
    tiny.feed(model, tiny.tokens(20), caches, 20)
    path = save_prompt_cache(tmp_path / "prompt", caches)
    POLICIES._registered.pop(NAME)
    with pytest.raises(CacheStateError, match="'value-norm', which is not known here"):
        load_prompt_cache(path)


def test_a_package_that_is_broken_is_named(monkeypatch):
    from importlib.metadata import EntryPoint

    entries = {
        "gone": EntryPoint("gone", "no_such_module:P", registry.GROUP),
        "other": EntryPoint("other", "math:pi", registry.GROUP),
        "tova": EntryPoint("tova", "math:pi", registry.GROUP),
    }
    monkeypatch.setattr(registry, "_installed", lambda: entries)
    with pytest.raises(OptionError, match="'gone' of no_such_module"):
        PolicyKVCache(8, "gone")
    with pytest.raises(OptionError, match="'other', which is not a Policy"):
        PolicyKVCache(8, "other")
    assert PolicyKVCache(8, "tova").rule.reads_attention
    assert "gone" in POLICIES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"value_weighted": True}, "memory and value_weighted say how attention"),
        ({"memory": 0.5}, "memory and value_weighted say how attention"),
        ({"score": lambda *_: 0, "value_weighted": True}, "how attention counts"),
        ({"score": lambda *_: 0, "reads_attention": True}, "not by both"),
        ({"granularity": "head"}, "evicts by age does so alike"),
        ({"recent_share": 0.5}, "protects no recent tokens"),
        ({"options": ("memory",)}, "cannot read memory"),
        ({"score": lambda *_: 0, "options": ("memory",)}, "cannot read memory"),
        ({"reads_attention": True, "memory": 2}, "from 0 to 1"),
        ({"name": "a b"}, "cannot be called 'a b'"),
        ({"name": "tova"}, "is a policy of tova_mlx"),
    ],
)
def test_what_means_nothing_is_refused(options, message):
    with pytest.raises(OptionError, match=message):
        register_policy(Policy(**{"name": "x", "keeps": "", "source": "", **options}))
    with pytest.raises(OptionError, match="is not a Policy"):
        register_policy("tova")
