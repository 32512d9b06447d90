"""Hostile files: a line of error or a right result. scripts/fuzz_files.py has more."""

import importlib.util
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import hostile
import hostile_archives
import hostile_caches
import hostile_own
import hostile_rows
import hostile_texts
import mlx.core as mx
import numpy as np
import pytest
import tiny
from mlx_lm.models import cache as mlx_lm_cache
from test_saved import read

from tova_mlx import (
    PolicyKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
)
from tova_mlx.cli import models, texts
from tova_mlx.errors import (
    CacheStateError,
    EvaluationError,
    ModelLoadError,
    PromptError,
    reason_of,
)
from tova_mlx.evaluation import lines
from tova_mlx.evaluation.results import Results
from tova_mlx.models import tensor_file
from tova_mlx.models.vocabulary import check_tokens
from tova_mlx.storage.log_directory import LogDirectory
from tova_mlx.storage.row_log import BLOCK

HAS_GGUF = importlib.util.find_spec("gguf") is not None
needs_gguf = pytest.mark.skipif(not HAS_GGUF, reason="the extra `demo` is missing")
# How many inputs of each kind: all together take seconds.
SAMPLES = {
    "saved cache, bytes": 150,
    "saved cache, parts": 80,
    "saved cache of mlx-lm's own": 200,
    "rows of an evaluation": 40,
    "losses of an evaluation": 60,
    "answers of an evaluation": 100,
    "text": 60,
    "questions of a task": 60,
    "rows of an archive": 60,
    "archive in use": 6,
    "directory of an archive": 60,
}
OF_GGUF = {
    "model directory": 30,
    "GGUF": 20,
    "wheel of a demo model": 60,
    "saved chat": 30,
}
SEED = 7


def all_kinds():
    modules = [hostile_caches, hostile_own, hostile_rows, hostile_archives]
    modules += [hostile_texts]
    if HAS_GGUF:
        import hostile_models

        modules.append(hostile_models)
    return {kind.name: kind for module in modules for kind in module.kinds()}


@pytest.mark.parametrize(
    "name", [*SAMPLES, *(pytest.param(n, marks=needs_gguf) for n in OF_GGUF)]
)
def test_a_sample_of_hostile_files_is_refused_or_right(name, tmp_path):
    kind = all_kinds()[name]
    kind.make(tmp_path)
    found = [hostile.attempt(kind, i, SEED) for i in range((SAMPLES | OF_GGUF)[name])]
    failed = [(i, o.said) for i, (result, o) in enumerate(found) if result == "failed"]
    assert not failed, f"{len(failed)}, the first: input {failed[0][0]}\n{failed[0][1]}"
    # Or nothing would be tried.
    assert {result for result, _ in found} >= {"refused"}


# What was found, one by one


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A prompt saved by us, and the arrays and texts in it."""
    path = tmp_path_factory.mktemp("saved") / "prompt.safetensors"
    save_prompt_cache(path, read(tiny.make()), metadata={"title": "a"})
    arrays, texts = mx.load(str(path), return_metadata=True)
    mx.eval(arrays)
    return path, arrays, texts


def test_no_bit_of_a_saved_prompt_changes_unnoticed(saved, tmp_path):
    data = saved[0].read_bytes()
    dice, path = random.Random(0), tmp_path / "a.safetensors"
    state = hostile_caches.states(load_prompt_cache(saved[0])[0])
    for _ in range(60):
        at = dice.randrange(len(data))
        changed = bytes([data[at] ^ 1 << dice.randrange(8)])
        path.write_bytes(data[:at] + changed + data[at + 1 :])
        try:
            caches, _ = load_prompt_cache(path)
        except CacheStateError:
            continue
        # In the name of the checksum, say.
        assert hostile_caches.states(caches) == state


def test_a_checksum_is_no_part_of_the_metadata(saved, tmp_path):
    caches, metadata = load_prompt_cache(saved[0])
    assert metadata == {"title": "a"}
    assert len(saved[2]["0.tova_mlx_sum"]) == 64
    # mlx-lm reads it, and so does who wrote before there were any.
    assert len(mlx_lm_cache.load_prompt_cache(str(saved[0]))) == len(caches)
    path = tmp_path / "old.safetensors"
    mlx_lm_cache.save_prompt_cache(str(path), caches, {"title": "a"})
    assert load_prompt_cache(path)[1] == {"title": "a"}


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def array(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": array([1] * 1000, 0, 4)}, "1000 dimensions"),
        ({"a": array([2**30] * 3, 0, 0)}, "other bytes"),
        ({"a": array([2.0], 0, 8)}, "a shape"),
        ({"a": array([-2, -1], 0, 8)}, "a shape"),
        ({"a": array([2], 0, 8), "b": array([2], 0, 8)}, "share bytes"),
        ({"a": array([1], 4, 8)}, "leave some out"),
        ({"a": array([1], 0, 4)}, "header says"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"[1]", "names no arrays"),
        ({"__metadata__": {"a": 1}}, "not texts"),
    ],
)
def test_a_header_that_does_not_fit_its_file_is_refused(header, message, tmp_path):
    path = tmp_path / "a.safetensors"
    raw(path, header, bytes(8))
    with pytest.raises(ValueError, match=message):
        tensor_file.check(path)
    with pytest.raises(CacheStateError, match="not a whole saved prompt"):
        load_prompt_cache(path)


@pytest.mark.parametrize("n", [2**64 - 1, 2**62, 10**8 + 1, 10**6])
def test_a_header_longer_than_its_file_is_not_allocated(n, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(n.to_bytes(8, "little") + b"{}")
    with pytest.raises(CacheStateError, match="cut off within its header"):
        load_prompt_cache(path)


def test_names_of_thousands_of_parts_take_no_memory(saved, tmp_path):
    path = tmp_path / "a.safetensors"
    name = ".".join(["0"] * 30_000)
    texts = {n: t for n, t in saved[2].items() if n != "0.tova_mlx_sum"}
    mx.save_safetensors(str(path), {**saved[1], name: mx.zeros((1,))}, texts)
    hostile.resident()
    before = hostile.resident()
    with pytest.raises(CacheStateError, match="a name of 30000 parts"):
        load_prompt_cache(path)
    assert hostile.resident() - before < 200 << 20


def test_an_error_about_a_file_is_a_line_that_can_be_shown():
    assert reason_of(ValueError("\x1b[31ma\nb")) == "\ufffd[31ma"
    assert reason_of(ValueError("x" * 10**6)) == "x" * 200
    assert reason_of(KeyError()) == "KeyError"


def state_of(policy="tova", **options):
    state = [*read(tiny.make(), policy=policy, **options)[0].state]
    return state, json.loads(state[-1])


def test_the_norm_of_the_victim_is_a_number_too():
    # It comes back when the newest token is taken back.
    state, _ = state_of(value_weighted=True)
    norms = np.array(state[4])
    norms[..., int(state[5].item())] = np.nan
    state[4] = mx.array(norms)
    with pytest.raises(CacheStateError, match="value_norms that are not numbers"):
        PolicyKVCache.from_state(tuple(state))


def test_keys_that_products_overflow_with_are_refused():
    state, _ = state_of()
    state[0] = state[0] * 1e30
    with pytest.raises(CacheStateError, match="keys or values that are not numbers"):
        PolicyKVCache.from_state(tuple(state))


def test_values_of_another_width_than_those_held_are_refused():
    cache = PolicyKVCache(12, "window")
    cache.update_and_fetch(mx.ones((1, 2, 3, 8)), mx.ones((1, 2, 3, 8)))
    with pytest.raises(CacheStateError, match=r"values .* do not fit a cache"):
        cache.update_and_fetch(mx.ones((1, 2, 1, 8)), mx.ones((1, 2, 1, 4)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *[(0, 64), (2, 0), (2, -1.0), (2, float("nan")), (2, 1e308)],
        *[(3, float("nan")), (3, 0), (3, 1e30)],
    ],
)
def test_a_rotation_that_gives_no_angles_is_refused(place, value):
    state, config = state_of(positions="compact")
    config["renumbering"][2][place] = value
    state[-1] = json.dumps(config)
    with pytest.raises(CacheStateError, match="a rotation"):
        PolicyKVCache.from_state(tuple(state))


@pytest.mark.parametrize("recall", [1040, 2048])
def test_recall_may_be_more_than_an_archive_has_room_for(recall):
    model = tiny.make(head_dim=64)
    caches = make_prompt_cache(model, recall + 12, recall=recall)
    for cache in caches:
        # Or it takes a thousand tokens before one is archived.
        cache.slots.recall = replace(cache.slots.recall, period=128)
    logits = tiny.feed(model, tiny.tokens(300), caches, 64)
    assert np.isfinite(np.array(logits)).all()
    # All that was archived comes back.
    assert len(caches[0].recalled_positions) == caches[0].archived > 0


def test_a_state_that_mlx_lm_takes_for_a_cache_is_refused(tmp_path):
    cache = mlx_lm_cache.KVCache()
    cache.update_and_fetch(mx.ones((1, 2, 3, 8)), mx.ones((1, 2, 3, 8)))
    path = tmp_path / "a.safetensors"
    for offset in (10**6, -1, 0.5, True):
        cache.offset = offset
        mlx_lm_cache.save_prompt_cache(str(path), [cache])
        with pytest.raises(CacheStateError, match="slots for"):
            load_prompt_cache(path)


def test_a_block_of_another_log_is_not_taken_for_one_of_this(tmp_path):
    directory = LogDirectory(tmp_path / "logs")
    logs = [directory.log(n, {"keys": (np.float32, (3,))}) for n in ("a", "b")]
    for i, log in enumerate(logs):
        log.append({"keys": np.full((BLOCK, 3), i, np.float32)})
    one, other = (tmp_path / "logs" / f"{n}.keys.rows" for n in ("a", "b"))
    with one.open("r+b") as file:
        file.write(other.read_bytes())
    with pytest.raises(CacheStateError, match="block 0 is damaged"):
        logs[0].take([0])
    directory.close()


def test_a_file_of_others_is_left_as_it_is(tmp_path):
    path = tmp_path / "results.jsonl"
    for content in (b"notes without an end", b'{"a": 1}\n[1]', b"\xff\n", b"3\n{"):
        path.write_bytes(content)
        with pytest.raises(EvaluationError, match="no row of an evaluation"):
            Results(tmp_path, {}, ())
        assert path.read_bytes() == content
    path.write_bytes(b'{"a": 1}\n{"b": 2}')
    assert Results(tmp_path, {}, ()).rows() == [{"a": 1}, {"b": 2}]
    assert path.read_bytes() == b'{"a": 1}\n{"b": 2}\n'


def test_a_text_without_end_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(lines, "_MOST", 1 << 20)
    with pytest.raises(PromptError, match="larger than 16 MiB"):
        texts.read_given(None, Path("/dev/zero"), "PROMPT", "prompt")
    with pytest.raises(EvaluationError, match="more than 1 Mi characters"):
        lines.read_text(Path("/dev/zero"))


@needs_gguf
def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    import hostile_models

    made = hostile_models.Models()
    made.make(tmp_path)
    path = made.whole[0]
    model, tokenizer, _ = models.load(str(path))
    rows = model.model.embed_tokens.weight.shape[0]
    with pytest.raises(PromptError, match=f"Token {rows} of the prompt"):
        check_tokens(model, [0, rows])
    check_tokens(model, tokenizer.encode("hi"))
    file = path / "tokenizer.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    found["model"]["vocab"]["hi"] = rows
    file.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ModelLoadError, match="the tokenizer's 'hi' is number"):
        models.load(str(path))


@needs_gguf
def test_layers_that_no_weights_are_there_for_are_not_made(tmp_path):
    import hostile_models

    made = hostile_models.Models()
    made.make(tmp_path)
    path = made.whole[0] / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | {"num_hidden_layers": 2**40}), encoding="utf-8")
    with pytest.raises(ModelLoadError, match="num_hidden_layers is 1099511627776, of"):
        models.load(str(made.whole[0]))


def test_the_script_sees_a_hang_a_death_and_a_traceback(tmp_path):
    # A package of bugs stands before the one that is tried.
    script = Path(__file__).parents[1] / "scripts" / "fuzz_files.py"
    code = (
        "import sys, os, time\n"
        f"sys.path[:0] = [{str(script.parent)!r}, {str(Path(__file__).parent)!r}]\n"
        "import fuzz_files, hostile\n"
        "def bad(dice, n=iter(range(9))):\n"
        "    i = int(sys.argv[3]) + next(n)\n"
        "    if i == 1: os._exit(3)\n"
        "    if i == 2: time.sleep(60)\n"
        "    if i == 3: raise KeyError('a')\n"
        "    return hostile.Outcome('a', 'right')\n"
        "kind = hostile.Kind('bad', lambda place: None, bad)\n"
        "fuzz_files.all_kinds = lambda: {'bad': kind}\n"
        "if sys.argv[1] == '--work':\n"
        "    fuzz_files.work(sys.argv[2], *map(int, sys.argv[3:]))\n"
        "else:\n"
        "    fuzz_files.__file__ = __file__\n"
        "    for found in fuzz_files.results('bad', 0, 5, 0, 3):\n"
        "        last = ' '.join(found['said'].split()[-6:])\n"
        "        print(found['number'], found['result'], last, sep='|')\n"
    )
    file = tmp_path / "bad.py"
    file.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(file), "run"], capture_output=True, text=True
    )
    said = done.stdout.splitlines()
    assert said[3].endswith("KeyError: 'a'"), done.stderr
    assert said[:3] + said[4:] == [
        "0|right|",
        "1|failed|the process ended with 3",
        "2|failed|no answer in 3 s",
        "4|right|",
    ]
