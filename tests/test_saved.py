"""A saved prompt goes on to the bit where it was, or is refused with the reason."""

import json
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import tiny
import zoo
from mlx_lm.models import cache as mlx_lm_cache
from test_cache import CASES, EXTRA

from tova_mlx import (
    TOVACache,
    convert,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from tova_mlx.errors import CacheStateError

SIZES = [19, 1, 1, 1]


@pytest.fixture(scope="module")
def model():
    return tiny.make()


def read(model, size=12, **options):
    """Caches after 22 tokens, the last three decoded."""
    caches = make_prompt_cache(model, size, **options)
    tiny.feed(model, tiny.tokens(22), caches, SIZES)
    return caches


def go_on(model, caches):
    logits = tiny.feed(model, tiny.tokens(12, seed=5), caches, [5, 1, 1, 1, 4])
    return np.array(logits), [np.array(c.positions) for c in caches]


def same(one, other):
    return np.array_equal(one[0], other[0]) and all(
        map(np.array_equal, one[1], other[1])
    )


@pytest.mark.parametrize(("policy", "options"), CASES + EXTRA)
@pytest.mark.parametrize("size", [12, 40])
@pytest.mark.parametrize("whose", ["mlx-lm's", "ours"])
def test_what_comes_after_loading_is_the_same_to_the_bit(
    model, policy, options, size, whose, tmp_path
):
    path = tmp_path / "prompt.safetensors"
    caches = read(model, size, policy=policy, **options)
    if whose == "ours":
        save_prompt_cache(path, caches, metadata={"title": "a"})
        loaded, metadata = load_prompt_cache(path)
        assert metadata == {"title": "a"}
    else:
        mlx_lm_cache.save_prompt_cache(str(path), caches)
        loaded = mlx_lm_cache.load_prompt_cache(str(path))
    assert [c.rule for c in loaded] == [c.rule for c in caches]
    assert [c.offset for c in loaded] == [22] * 3
    assert same(go_on(model, loaded), go_on(model, caches))
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_process_loads_what_another_saved(model, tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, read(model, policy="fade"))
    code = (
        "import sys, json; from tova_mlx import load_prompt_cache\n"
        "caches, _ = load_prompt_cache(sys.argv[1])\n"
        "print(json.dumps([c.positions.tolist() for c in caches]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    kept = [c.positions.tolist() for c in read(model, policy="fade")]
    assert json.loads(done.stdout) == kept


def test_an_empty_cache_is_saved_and_loaded(model, tmp_path):
    save_prompt_cache(tmp_path / "a.safetensors", make_prompt_cache(model, 12))
    loaded, _ = load_prompt_cache(tmp_path / "a.safetensors")
    assert all(c.empty() for c in loaded)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(model, share, tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, read(model))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(CacheStateError, match="not a whole saved prompt"):
        load_prompt_cache(path)


def test_files_that_do_not_fit_the_model_are_refused(model, tmp_path):
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, read(model), model=model)
    user = tiny.make()
    convert(user, 12)
    load_prompt_cache(path, model=user)
    convert(user, 13)
    with pytest.raises(CacheStateError, match=r"max_size=12.*max_size=13"):
        load_prompt_cache(path, model=user)
    convert(user, 12, policy="fade")
    with pytest.raises(CacheStateError, match=r"policy=tova.*policy=fade"):
        load_prompt_cache(path, model=user)
    convert(user, 12, prefill="once")
    with pytest.raises(CacheStateError, match=r"prefill=stepwise.*prefill=once"):
        load_prompt_cache(path, model=user)
    other = tiny.make(seed=7)
    convert(other, 12)
    with pytest.raises(CacheStateError, match="another model"):
        load_prompt_cache(path, model=other)
    save_prompt_cache(path, read(model))
    wider = tiny.make(n_heads=8, n_kv_heads=4)
    convert(wider, 12)
    with pytest.raises(CacheStateError, match=r"2 heads of 8, but.*4 heads of 8"):
        load_prompt_cache(path, model=wider)
    save_prompt_cache(path, read(model)[:2])
    with pytest.raises(CacheStateError, match=r"2 layers, but .* has 3"):
        load_prompt_cache(path, model=user)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["config"].update(version=99), "version 99"),
        (lambda s: s["config"]["rule"].update(policy="lru"), "lru"),
        (lambda s: s["config"]["rule"].update(max_size=50), "positions|slots"),
        (lambda s: s["config"]["rule"].update(max_size=5), "13 slots"),
        (lambda s: s["config"]["rule"].update(memory=2), "no options give|memory"),
        (lambda s: s["config"].update(prefill="twice"), "prefill"),
        (lambda s: s.update(offset=-1), "tokens seen"),
        (lambda s: s.update(offset=5000.5), "tokens seen"),
        (lambda s: s.update(keys=None), "no keys"),
        (lambda s: s.update(values=s["values"][:, :1]), "values"),
        (lambda s: s.update(scores=None), "scores are not"),
        (lambda s: s.update(norms=s["norms"][..., :4]), "norms are not"),
        (lambda s: s.update(victim=s["victim"] + 10_000), "past 13 slots"),
        (lambda s: s.update(positions=s["positions"] * 0), "positions"),
        (lambda s: s.update(offset=13), "positions"),
    ],
)
def test_a_state_that_cannot_be_is_refused(model, change, message):
    names = [
        "keys",
        "values",
        "positions",
        "scores",
        "norms",
        "victim",
        "offset",
        "config",
    ]
    state = dict(zip(names, read(model, policy="fade")[0].state, strict=True))
    state["config"] = json.loads(state["config"])
    change(state)
    state["config"] = json.dumps(state["config"])
    with pytest.raises((CacheStateError, ValueError), match=message):
        TOVACache.from_state(tuple(state.values()))


def test_a_save_that_fails_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "prompt.safetensors"
    save_prompt_cache(path, read(model))
    before = path.read_bytes()

    def half(name, *_):
        with open(name, "wb") as file:
            file.write(b"half")
        raise RuntimeError("no space left")

    monkeypatch.setattr(mx, "save_safetensors", half)
    with pytest.raises(CacheStateError, match="no space left"):
        save_prompt_cache(path, read(model))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CacheStateError, match="Check the directory"):
        save_prompt_cache(tmp_path / "nowhere" / "a.safetensors", read(model))
    with pytest.raises(CacheStateError, match="no such file"):
        load_prompt_cache(tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", ["longcat_flash", "falcon_h1", "gemma3n", "gemma3"])
def test_models_with_caches_of_several_kinds_go_on_the_same(name, tmp_path):
    model, path = zoo.make(name), tmp_path / "prompt.safetensors"
    convert(model, 12)
    caches = model.make_cache()
    tiny.feed(model, tiny.tokens(22), caches, SIZES)
    save_prompt_cache(path, caches, model=model)
    more = tiny.tokens(12, seed=5)
    want = tiny.feed(model, more, caches, [5, 1, 1, 1, 4])
    loaded, _ = load_prompt_cache(path, model=model)
    got = tiny.feed(model, more, loaded, [5, 1, 1, 1, 4])
    assert mx.array_equal(want, got)
    convert(model, 13)
    with pytest.raises(CacheStateError, match=r"max_size=12.*makes.*max_size=13"):
        load_prompt_cache(path, model=model)
