"""What each layer keeps of a text: the data, the command, and the page in Chromium."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from test_kept import CASES, Pieces

import tova_mlx
from tova_mlx import (
    POLICIES,
    EvaluationError,
    OptionError,
    PolicyKVCache,
    PromptError,
    inspect,
    make_prompt_cache,
)
from tova_mlx.cli import inspection as command
from tova_mlx.cli import main, models
from tova_mlx.inspection import pieces
from tova_mlx.policies import RECALL_BLOCK

LENGTH, SIZE = 45, 12


class Words:
    """A tokenizer of 101 words, the first of which is special and not a word."""

    all_special_ids = (0,)
    chat_template = None

    def word(self, i):
        if i == 7:
            return "</script><!--\n"
        return "<s>" if i == 0 else f"w{i}" + ("\n" if i % 13 == 0 else " ")

    def decode(self, ids, clean_up_tokenization_spaces=False):
        return "".join(map(self.word, ids))

    def encode(self, text, verbose=True):
        return [int(i) for i in re.findall(r"w(\d+)", text)]


@pytest.fixture(scope="module")
def model():
    return tiny.make()


@pytest.fixture(scope="module")
def wide():
    """Heads of a width that an archive can store."""
    return tiny.make(head_dim=64)


@pytest.fixture(scope="module")
def ids():
    return tiny.tokens(LENGTH)[0].tolist()


def run(*arguments, **options):
    return CliRunner().invoke(main, list(arguments), **options)


# The data


def held_by_caches(model, ids, size, **options):
    """For each number of tokens read, layer and head, the positions held."""
    caches = make_prompt_cache(model, size, **options)
    held, back = [], []
    for token in ids:
        mx.eval(model(mx.array([[token]]), cache=caches), [c.state for c in caches])
        held.append([[set(h) for h in c.positions[0].tolist()] for c in caches])
        back.append([set(c.recalled_positions) for c in caches])
    return held, back


def check_held(record, held):
    for n, layers in enumerate(held, 1):
        for layer, heads in zip(record.layers, layers, strict=True):
            found = [set(np.flatnonzero(row).tolist()) for row in layer.held(n)]
            assert found == heads, (n, layer.layer)


@pytest.mark.parametrize("step", [1, 7, 256])
@pytest.mark.parametrize(("policy", "options"), CASES)
def test_what_is_held_is_what_caches_hold_after_each_token(
    model, ids, policy, options, step
):
    held, _ = held_by_caches(model, ids, SIZE, policy=policy, **options)
    options = {"policy": policy, "prefill_step_size": step, **options}
    found = inspect(model, Words(), ids, SIZE, **options)
    (record,) = found.records
    assert (record.policy, record.max_kv_size) == (policy, SIZE)
    check_held(record, held)
    for layer in record.layers:
        if POLICIES[policy].resolve(SIZE, {}).by_age:
            assert layer.scores is None
        else:
            evicted = layer.evicted < LENGTH
            assert np.array_equal(np.isfinite(layer.scores), evicted)


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_what_comes_back_is_what_caches_recall_at_each_token(
    wide, granularity, monkeypatch
):
    # Rows are archived as they come: in chunks a code may be another one by rounding.
    monkeypatch.setattr("tova_mlx.caches.options._ARCHIVED", None)
    n, size = 330, 48
    ids = tiny.tokens(n)[0].tolist()
    options = {"policy": "tova", "recall": 16, "granularity": granularity}
    held, back = held_by_caches(wide, ids, size, **options)
    # Token by token, as those caches: a block that two queries attend to nearly alike
    # may be another one in chunks, by rounding alone.
    (record,) = inspect(
        wide, Words(), ids, size, prefill_step_size=1, **options
    ).records
    (chunked,) = inspect(
        wide, Words(), ids, size, prefill_step_size=200, **options
    ).records
    assert record.max_kv_size == size
    check_held(record, held)
    for layer, other in zip(record.layers, chunked.layers, strict=True):
        assert np.mean(layer.evicted == other.evicted) > 0.9
        assert np.mean(layer.recalled.times == other.recalled.times) > 0.8
    for i, layer in enumerate(record.layers):
        got = layer.recalled
        times = np.zeros(n, int)
        for step, read in enumerate(back):
            recalled = sorted(read[i])
            times[recalled] += 1
            blocks = [b for b in got.blocks[step] if b >= 0]
            assert blocks == sorted({p // RECALL_BLOCK for p in recalled})
        assert times.any()
        assert got.times.tolist() == times.tolist()
        for p in range(n):
            steps = [s for s, read in enumerate(back) if p in read[i]] or [-1]
            assert (got.first[p], got.last[p]) == (steps[0], steps[-1])


def replayed_scores(queries, keys, values, scale, size, rule):
    """The score of each token when it goes, in float64 from the rule alone."""
    n_heads, n = queries.shape[:2]
    n_kv = keys.shape[0]
    group = n_heads // n_kv
    choosers = n_kv if rule.per_head else 1
    out = np.full((choosers, n), np.nan)
    for c in range(choosers):
        mine = [h for h in range(n_heads) if choosers == 1 or h // group == c]
        held, score = [], {}
        for t in range(n):
            held.append(t)
            got = dict.fromkeys(held, 0.0)
            for h in mine:
                logits = [scale * queries[h, t] @ keys[h // group, p] for p in held]
                weights = np.exp(logits - np.max(logits))
                weights /= weights.sum()
                for p, w in zip(held, weights, strict=True):
                    norm = np.linalg.norm(values[h // group, p])
                    got[p] += w * (norm if rule.value_weighted else 1) / len(mine)
            score = {p: rule.memory * score.get(p, 0) + got[p] for p in held}
            if len(held) > size:
                free = [p for p in held if rule.n_sinks <= p <= t - rule.n_recent]
                victim = min(free, key=lambda p: (score[p], p))
                out[c, victim] = score[victim]
                held.remove(victim)
    return out


@pytest.mark.parametrize("policy", ["tova", "h2o", "vatp", "fade"])
@pytest.mark.parametrize("sizes", [[1] * 40, [40], [5, 1, 20, 1, 13]])
def test_scores_are_those_that_the_rule_gives(policy, sizes):
    rng = np.random.default_rng(3)
    queries, keys, values = (
        (3 * rng.standard_normal((heads, 40, 5))).astype(np.float32)
        for heads in (6, 2, 2)
    )
    cache = PolicyKVCache(9, policy)
    expected = replayed_scores(queries, keys, values, 0.4, 9, cache.rule)
    found = np.full_like(expected, np.nan)

    def note(steps, positions, scores):
        found_at = np.array(positions[0])
        np.put_along_axis(found, found_at, np.array(scores[0]), axis=1)

    cache.observe(note, scores=True)
    start = 0
    for size in sizes:
        q, k, v = (
            mx.array(a)[None, :, start : start + size] for a in (queries, keys, values)
        )
        mask = cache.make_mask(size)
        cache.attend(q, *cache.update_and_fetch(k, v), scale=0.4, mask=mask)
        start += size
    assert np.isfinite(expected).any()
    assert np.allclose(found, expected, rtol=1e-4, atol=1e-7, equal_nan=True)


def test_a_policys_own_score_is_the_same_in_steps_and_blocks(model, ids):
    both = [
        inspect(model, Words(), ids, SIZE, policy="keydiff", prefill_step_size=step)
        for step in (1, 256)
    ]
    one, block = ([r.scores for r in f.records[0].layers] for f in both)
    assert np.allclose(one, block, atol=1e-5, equal_nan=True)
    assert len(np.unique(np.round(block, 5))) > 20


def test_a_cut_of_once_says_its_scores(model, ids):
    found = inspect(model, Words(), ids, SIZE, prefill="once", prefill_step_size=20)
    for layer in found.records[0].layers:
        steps = sorted(set(layer.evicted[layer.evicted < LENGTH].tolist()))
        assert steps == [19, 39, 44]
        kept = layer.evicted == LENGTH
        assert kept.sum() == SIZE
        assert np.array_equal(np.isnan(layer.scores), kept)


def test_nothing_is_noted_for_who_does_not_ask(model, ids, monkeypatch):
    from tova_mlx.attention import block

    asked, real = [], block.scan_block

    def scan(*args, at_eviction=False, **options):
        asked.append(at_eviction)
        return real(*args, at_eviction=at_eviction, **options)

    monkeypatch.setattr(block, "scan_block", scan)
    caches = make_prompt_cache(model, SIZE)
    seen = []
    with tova_mlx.observe_evictions(caches, lambda *event: seen.append(event)):
        tiny.feed(model, mx.array([ids]), caches, 20)
    assert {len(event) for event in seen} == {3}
    assert set(asked) == {False}
    inspect(model, Words(), ids, SIZE)
    assert asked[-1]


def test_a_policy_without_limit_evicts_nothing(model, ids):
    found = inspect(model, Words(), ids, None, policy="full")
    (record,) = found.records
    assert record.label == "full"
    assert record.share_held().tolist() == [1] * LENGTH
    assert record.layers[0].to_dict()["evicted"] == [[None] * LENGTH]


def test_the_data_is_json_that_says_it_all(model, ids):
    found = inspect(
        model, Words(), ids, SIZE, policy=("h2o", "streaming"), max_tokens=30, name="x"
    )
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (told["model"], told["tokens"], told["ids"]) == ("x", 30, ids[:30])
    assert "".join(told["pieces"]) == Words().decode(ids[:30])
    assert told["piece_of"] == list(range(30))
    assert [s["policy"] for s in told["settings"]] == ["h2o", "streaming"]
    for setting, record in zip(told["settings"], found.records, strict=True):
        for row, layer in zip(setting["layers"], record.layers, strict=True):
            again = [[30 if s is None else s for s in h] for h in row["evicted"]]
            assert np.array_equal(again, layer.evicted)
    assert told["settings"][1]["layers"][0]["scores"] is None


def test_what_cannot_be_inspected_is_refused(model, ids):
    with pytest.raises(OptionError, match="Name one or two"):
        inspect(model, Words(), ids, SIZE, policy=("tova", "tova"))
    with pytest.raises(OptionError, match="Name one or two"):
        inspect(model, Words(), ids, SIZE, policy=("tova", "h2o", "fade"))
    with pytest.raises(PromptError, match="no tokens"):
        inspect(model, Words(), "", SIZE)
    one = inspect(model, Words(), ids, SIZE)
    with pytest.raises(OptionError, match="Read the same text"):
        one.beside(inspect(model, Words(), ids[1:], SIZE))
    two = one.beside(inspect(model, Words(), ids, 2 * SIZE))
    assert [r.max_kv_size for r in two.records] == [SIZE, 2 * SIZE]
    with pytest.raises(OptionError, match="3 settings"):
        two.beside(one)


# The text


def test_a_character_of_several_tokens_is_one_piece():
    smile = "😀".encode()
    cut = [None, b" an", b" ", smile[:2], smile[2:], b"\xe2\x80", b"\x99", b" x"]
    tokenizer = Pieces(cut)
    tokenizer.decode = with_special(tokenizer.decode)
    got = pieces.Pieces.of(tokenizer, list(range(8)), 8)
    assert got.texts == ("<0>", "an", " ", "😀", "’", " x")
    assert got.piece_of == (0, 1, 2, 3, 3, 4, 4, 5)
    assert got.special == {0}
    # A text that ends within a character shows it whole.
    assert pieces.Pieces.of(tokenizer, list(range(8)), 4).texts[-1] == "😀"


def with_special(decode):
    return lambda ids, **how: "<0>" if ids == [0] else decode(ids, **how)


def test_tokens_that_end_one_character_and_begin_another_lose_none():
    # Merges across characters: each token completes one and begins the next.
    data = "😀😁😂🙂😎😡".encode()
    edges = [0, 2, 6, 10, 14, 18, 22, 24]
    cut = [data[a:b] for a, b in pairwise(edges)]
    tokenizer = Pieces([*cut, b" end"])
    tokenizer.all_special_ids = []
    got = pieces.Pieces.of(tokenizer, list(range(8)), 8)
    assert "".join(got.texts) == data.decode() + " end"
    assert got.texts[-1] == " end"


@pytest.mark.real_model
def test_texts_of_many_scripts_come_through(demo):
    _, tokenizer = demo
    text = "naïve 😀👩‍👩‍👧🏽 日本語テキスト नमस्ते 𝒳𝒴\n\n\tEnd🤷🏻‍♂️🏴󠁧󠁢󠁥󠁮󠁧󠁿 ok</script>"
    ids = tokenizer.encode(text)
    got = pieces.Pieces.of(tokenizer, ids, len(ids))
    assert "".join(got.texts) == text
    assert len(got.texts) < len(ids)


# The command


@pytest.fixture
def tiny_command(monkeypatch, model):
    monkeypatch.setattr(models, "load", lambda _: (model, Words(), "/models/tiny"))


def words(n):
    return " ".join(f"w{i}" for i in tiny.tokens(n)[0].tolist())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("x",), 2, "Give --out FILE for the page, --json, or both."),
        ((), 2, "Missing argument 'TEXT_OR_FILE'"),
        (("x", "--out", "/nothing/page.html"), 2, "no directory /nothing"),
        (("x", "--out", "/"), 2, "'/' is a directory"),
        (("/", "--json"), 2, "/ is a directory"),
        ((" ", "--json"), 1, "the text is empty"),
        (("x", "--json", "--policy", "lru"), 2, "'lru' is not one of"),
        (("x", "--json", *["--policy", "tova"] * 2), 2, "twice with two names"),
        (("x", "--json", "--tokens", "0"), 2, "'--tokens': 0 is not in the range"),
        (("x", "--json", "--max-kv-size", "0"), 2, "0 is not in the range"),
        (
            ("x", "--json", "--policy", "tova", "--policy", "window", "--n-sinks", "2"),
            2,
            "window does not read --n-sinks 2",
        ),
        (("x", "--json", "--model", "./nothing"), 1, "no such directory"),
        (("x", "--json", "--archive", "a"), 2, "--archive does nothing without"),
    ],
)
def test_bad_input_is_one_line(arguments, code, message):
    result = run("inspect", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    if code == 1:
        assert len(result.stderr.splitlines()) == 1


def test_a_file_the_text_itself_and_stdin_are_read_alike(tiny_command, tmp_path):
    text = words(30)
    file = tmp_path / "text.txt"
    file.write_text(text)
    options = ("--json", "--max-kv-size", "12")
    told = [
        json.loads(run("inspect", str(file), *options).stdout),
        json.loads(run("inspect", text, *options).stdout),
        json.loads(run("inspect", "-", *options, input=text).stdout),
    ]
    assert told[0] == told[1] == told[2]
    assert told[0]["tokens"] == 30
    assert told[0]["model"] == "tiny"
    result = run("inspect", "w1.txt", *options)
    assert "No file w1.txt: it is read as a text." in result.stderr
    assert "of 1 tokens none was evicted" in result.stderr


def test_the_command_writes_a_page_and_says_what_is_in_it(tiny_command, tmp_path):
    out = tmp_path / "page.html"
    result = run(
        *("inspect", words(60), "--out", str(out), "--max-kv-size", "12"),
        *("--policy", "h2o", "--policy", "window", "--tokens", "50"),
    )
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert re.split("  +", lines[0].strip())[:3] == ["setting", "layers", "tokens"]
    assert lines[2].split() == ["window", "12", "3", "50", "12", "0", "38"]
    assert re.fullmatch(rf"{out}: \d+ kB, open it in a browser", lines[-1])
    assert "Traceback" not in result.stderr
    assert result.stderr == ""
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(tmp_path.iterdir()) == [out]


def test_a_page_that_cannot_be_written_leaves_what_was_there(
    tiny_command, tmp_path, monkeypatch
):
    out = tmp_path / "page.html"
    out.write_text("as it was")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result = run("inspect", words(20), "--out", str(out))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(
        f"Error: {out}: cannot be written (No space left on device)."
    )
    assert out.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(EvaluationError):
        inspect(tiny.make(), Words(), [1, 2], 2).save(tmp_path / "x" / "y.html")


def test_a_directory_that_cannot_be_written_is_refused_before_reading(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(models, "load", lambda _: pytest.fail("a model was loaded"))
    result = run("inspect", "Some words", "--out", str(tmp_path / "page.html"))
    assert result.exit_code == 2
    assert f"no writing to {tmp_path}. Name a file in a" in result.stderr


def test_help_says_that_it_is_an_html_page():
    assert "HTML page" in run("inspect", "--help").stdout
    assert command.inspect.name == "inspect"


# The page, in Chromium


def chromium():
    """Where Chromium or its like is, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def browser():
    reason = None
    if chromium() is None:
        reason = "no Chromium: apt-get install chromium"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        reason = "no playwright: it is in the extra dev"
    if reason is not None:
        if os.environ.get("CI") and sys.platform == "linux":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        # Root, as in a container, has no sandbox.
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


class Page:
    """A page in a browser that is closed to the network, and what went wrong in it."""

    def __init__(self, browser, path, **options):
        options = {"viewport": {"width": 1400, "height": 1000}, **options}
        self.context = browser.new_context(offline=True, **options)
        self.errors, self.asked = [], []
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.errors.append(m.text))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", timeout=60_000)

    def go(self, n):
        """Move the slider, and wait until it is drawn."""
        self.page.evaluate(
            "n => { const s = document.getElementById('time'); s.value = n;"
            " s.dispatchEvent(new Event('input')); }",
            n,
        )
        self.drawn(n)

    def drawn(self, n=None):
        if n is not None:
            self.page.wait_for_selector(f"html[data-now='{n}']")
        frame = "() => new Promise(r => requestAnimationFrame(() => setTimeout(r, 0)))"
        for _ in range(2):
            self.page.evaluate(frame)

    def classes(self, k=0):
        script = "k => [...document.querySelectorAll(`#text-${k} .t`)]"
        return self.page.evaluate(f"{script}.map(t => t.className.split(' '))", k)

    def levels(self, k=0):
        """The colour of each token: 0 to 10, or "u" for one not read."""
        found = []
        for names in self.classes(k):
            (level,) = (c for c in names if re.fullmatch(r"b\d+|u", c))
            found.append(level if level == "u" else int(level[1:]))
        return found

    def marked(self, name, k=0):
        return [i for i, names in enumerate(self.classes(k)) if name in names]

    def close(self):
        self.context.close()
        assert self.errors == []
        assert all(url.startswith(("file:", "data:")) for url in self.asked)


@pytest.fixture
def open_page(browser, tmp_path):
    pages = []

    def opened(found, **options):
        path = found.save(tmp_path / f"page-{len(pages)}.html")
        pages.append(Page(browser, path, **options))
        return pages[-1]

    yield opened
    for each in pages:
        each.close()


def levels(record, n, layers=None):
    """The colours of a record when n tokens were read."""
    chosen = [r for r in record.layers if layers is None or r.layer in layers]
    share = np.mean([r.held(n).mean(axis=0) for r in chosen], axis=0)
    some = np.ceil(share * 10 - 1e-4).astype(int)
    return [
        "u" if p >= n else max(1, some[p]) if share[p] else 0 for p in range(len(share))
    ]


@pytest.fixture(scope="module")
def found(model):
    """Two policies of unlike granularity, over a text of several paragraphs."""
    ids = tiny.tokens(150)[0].tolist()
    return inspect(
        model, Words(), [0, *ids], 32, policy=("tova", "h2o"), name="a <b>model</b>"
    )


def test_the_page_shows_the_text_and_who_holds_it_at_any_time(open_page, found):
    shown = open_page(found)
    text = shown.page.locator("#text-0 .text").evaluate("e => e.textContent")
    assert text == "".join(found.pieces.texts)
    assert "</script>" in text
    assert "a <b>model</b>" in shown.page.locator("#meta").text_content()
    for n in (151, 90, 33, 32, 1, 0, 120):
        shown.go(n)
        for k, record in enumerate(found.records):
            assert shown.levels(k) == levels(record, n), n
        slider = shown.page.locator("#time")
        said = slider.get_attribute("aria-valuetext")
        assert said == f"{n} of 151 tokens read"
    held = shown.page.locator("tbody tr").nth(1).locator("td").nth(1)
    assert held.text_content() == "32"


def test_the_slider_and_play_go_by_keyboard_and_mouse(open_page, found):
    shown = open_page(found)
    slider = shown.page.get_by_label("Tokens read")
    slider.focus()
    shown.page.keyboard.press("Home")
    shown.drawn(0)
    shown.page.keyboard.press("ArrowRight")
    shown.drawn(1)
    assert shown.levels()[:2] == [10, "u"]
    shown.page.get_by_role("button", name="Play").click()
    read = "+document.documentElement.dataset.now"
    while shown.page.evaluate(read) < 4:
        shown.page.wait_for_timeout(20)
    shown.page.get_by_role("button", name="Pause").click()
    shown.drawn()
    now = shown.page.evaluate(read)
    assert shown.levels() == levels(found.records[0], now)


def test_layers_can_be_left_out(open_page, found):
    shown = open_page(found)
    shown.page.get_by_label("Layer 1").uncheck()
    shown.drawn()
    for k, record in enumerate(found.records):
        assert shown.levels(k) == levels(record, 151, (0, 2))
    shown.page.get_by_label("Layer 0").focus()
    shown.page.keyboard.press("ArrowDown")
    shown.page.keyboard.press("ArrowDown")
    shown.page.keyboard.press("Enter")
    shown.drawn()
    assert shown.levels() == levels(found.records[0], 151, (2,))
    shown.page.get_by_role("button", name="None").click()
    shown.drawn()
    assert set(shown.levels()) == {0}
    shown.page.get_by_role("button", name="All layers").click()
    shown.drawn()
    assert shown.levels() == levels(found.records[0], 151)


def fates(shown, k, per):
    """What the table says of a setting: evicted after, and score, of each layer."""
    rows = shown.page.locator("tbody tr")
    script = f"(rows) => rows.map(r => [...r.cells].slice({1 + 4 * k}, {1 + per}))"
    script += ".map(c => c.map(d => d.textContent))"
    return rows.evaluate_all(script)


def test_a_token_says_when_each_layer_evicted_it(open_page, found):
    shown = open_page(found)
    shown.page.locator("#text-0 .t").nth(20).hover()
    for layer, row in zip(found.records[0].layers, fates(shown, 0, 4), strict=True):
        step, score = layer.evicted[0, 20], layer.scores[0, 20]
        assert row[1] == "32"
        assert row[2] == ("held" if step == 151 else str(step + 1))
        if step < 151:
            assert float(row[3]) == pytest.approx(score, rel=0.06)
    for layer, row in zip(found.records[1].layers, fates(shown, 1, 8), strict=True):
        steps = layer.evicted[:, 20]
        gone = sorted({int(s) + 1 for s in steps if s < 151})
        if (steps == 151).all():
            assert row[2] == "held"
        elif (steps == 151).any():
            assert row[2] == "1/2 held"
        else:
            assert row[2] == "–".join(map(str, gone))
    card = shown.page.locator("#card").text_content()
    assert "token 21 of 151" in card
    assert shown.marked("h", 0) == shown.marked("h", 1) == [20]


def test_tokens_are_reached_and_told_by_keyboard(open_page, found):
    shown = open_page(found)
    text = shown.page.locator("#text-0 .text")
    text.locator(".t[tabindex='0']").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        shown.page.keyboard.press(key)
    assert shown.marked("h") == [1]
    said = shown.page.get_by_role("status").text_content()
    assert said.startswith("token 2 of 151: tova 32: held by ")
    assert text.locator("[tabindex='0']").count() == 1
    focused = "getComputedStyle(document.activeElement)"
    assert shown.page.evaluate(f"{focused}.outlineStyle") == "solid"
    shown.page.keyboard.press("ArrowDown")
    below = shown.marked("h")[0]
    box = "i => document.querySelectorAll('#text-0 .t')[i].getBoundingClientRect().top"
    assert shown.page.evaluate(box, below) > shown.page.evaluate(box, 1)
    shown.page.keyboard.press("ArrowUp")
    shown.page.keyboard.press("End")
    assert shown.marked("h") == [150]
    shown.page.keyboard.press("Home")
    shown.page.keyboard.press("ArrowRight")
    shown.page.keyboard.press("Enter")
    shown.drawn(2)
    assert shown.levels()[:3] == [10, 10, "u"]


def test_one_of_two_texts_can_be_shown_alone(open_page, found):
    shown = open_page(found)
    texts = [shown.page.locator(f"#text-{k}") for k in (0, 1)]
    assert [t.is_visible() for t in texts] == [True, True]
    boxes = [t.bounding_box() for t in texts]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] < boxes[1]["x"]
    shown.page.get_by_label("h2o", exact=True).check(force=True)
    assert [t.is_visible() for t in texts] == [False, True]
    narrow = open_page(found, viewport={"width": 390, "height": 800})
    texts = [narrow.page.locator(f"#text-{k}") for k in (0, 1)]
    assert [t.is_visible() for t in texts] == [True, False]
    across = narrow.page.evaluate("document.documentElement.scrollWidth")
    assert across <= 390


def luminance(rgb):
    part = [x / 255 for x in rgb]
    part = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in part]
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_colour_can_be_read(open_page, found, scheme):
    shown = open_page(found, color_scheme=scheme)
    colours = shown.page.evaluate(
        """() => {
          const text = document.querySelector('#text-0 .t'), out = [];
          const page = getComputedStyle(document.body).backgroundColor;
          for (const c of ['u', ...Array.from({length: 11}, (_, i) => 'b' + i)]) {
            text.className = 't ' + c;
            const style = getComputedStyle(text), back = style.backgroundColor;
            out.push([c, style.color, back === 'rgba(0, 0, 0, 0)' ? page : back]);
          }
          for (const e of document.querySelectorAll('.meta, .keys, .place, th, .note'))
            out.push([e.className, getComputedStyle(e).color, page]);
          return out;
        }"""
    )
    lights = []
    for name, *pair in colours:
        rgb = [[int(x) for x in re.findall(r"\d+", c)[:3]] for c in pair]
        dark, bright = sorted(map(luminance, rgb))
        assert (bright + 0.05) / (dark + 0.05) >= 4.5, (name, pair)
        if re.fullmatch(r"b\d+", name):
            lights.append(luminance(rgb[1]))
    # One after the other, so that hue is not needed.
    assert lights[1:] == sorted(lights[1:], reverse=scheme == "light")
    assert (lights[0] > 0.8) == (scheme == "light")


@pytest.mark.parametrize("options", [{}, {"granularity": "layer"}])
def test_what_came_back_is_marked(open_page, wide, options):
    ids = tiny.tokens(300)[0].tolist()
    found = inspect(wide, Words(), ids, 48, recall=16, **options)
    shown = open_page(found, viewport={"width": 1400, "height": 3000})
    _, back = held_by_caches(wide, ids, 48, recall=16)
    for n in (300, 261, 130, 100):
        shown.go(n)
        assert shown.marked("r") == sorted(set().union(*back[n - 1])), n
        counts = Counter(p for layer in back[n - 1] for p in layer)
        assert shown.marked("rr") == sorted(p for p, k in counts.items() if k > 1), n
    shown.page.get_by_label("Layer 2").focus()
    shown.page.keyboard.press("Enter")
    shown.go(300)
    assert shown.marked("r") == sorted(back[299][2])
    shown.page.locator("#text-0 .t").nth(min(back[299][2])).hover()
    assert "came back in 1 layer" in shown.page.locator("#card").text_content()


@pytest.mark.parametrize("breaks", [True, False])
def test_what_is_far_away_is_coloured_when_it_comes_near(open_page, model, breaks):
    """With paragraphs, and in one of thousands of tokens."""
    ids = [i if breaks or i % 13 else 1 for i in tiny.tokens(3000)[0].tolist()]
    ids = [i if breaks or i != 7 else 1 for i in ids]
    found = inspect(model, Words(), ids, 64, policy="streaming")
    shown = open_page(found)
    shown.go(2990)
    shown.page.locator("#text-0 .t").nth(2980).scroll_into_view_if_needed()
    shown.drawn()
    assert shown.levels()[2930:] == levels(found.records[0], 2990)[2930:]
    shown.page.evaluate("scrollTo(0, 0)")
    shown.go(3)
    assert shown.levels()[:60] == levels(found.records[0], 3)[:60]


@pytest.mark.real_model
def test_a_page_of_the_command_and_the_demo_model(browser, demo_path, tmp_path, text):
    file, out = tmp_path / "text.txt", tmp_path / "page.html"
    file.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tova_mlx", "inspect", str(file)),
            *("--out", str(out), "--model", str(demo_path), "--tokens", "300"),
            *("--max-kv-size", "64", "--policy", "tova", "--policy", "fade", "--json"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["page"] == str(out)
    assert text.startswith("".join(told["pieces"]))
    # 2,000 tokens of it are below 3 MB.
    assert out.stat().st_size < 3e6 * 300 / 2000
    shown = Page(browser, out)
    evicted = [layer["evicted"][0] for layer in told["settings"][0]["layers"]]
    assert len(evicted) == 30
    shown.go(200)
    for p, level in enumerate(shown.levels()[:200]):
        share = np.mean([row[p] is None or row[p] >= 200 for row in evicted])
        assert level == (max(1, int(np.ceil(share * 10 - 1e-4))) if share else 0)
    shown.close()
