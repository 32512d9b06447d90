"""Facts hidden in a text: where they stand, how answers count, rows that resume."""

import json
import random
import re
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from mlx_lm.tokenizer_utils import TokenizerWrapper

from tova_mlx.cli import evaluation, main, models
from tova_mlx.errors import EvaluationError
from tova_mlx.evaluation import haystack as haystacks
from tova_mlx.evaluation import needle, reading
from tova_mlx.evaluation.results import Results, Setting, settings

FULL, TOVA, WINDOW = Setting("full", None), Setting("tova", 24), Setting("window", 24)
DEPTHS = (0.0, 0.3, 0.5, 1.0)


class Characters:
    """A tokenizer of one token per character, in the vocabulary of `tiny`."""

    chat_template = "a template"
    eos_token_id = 2
    clean_up_tokenization_spaces = False

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return [ord(c) - 27 if " " <= c <= "~" else 3 for c in text]

    def decode(self, tokens):
        return "".join(chr(t + 27) if t > 4 else "\n" for t in tokens)

    def get_vocab(self):
        return {}

    def apply_chat_template(self, messages, tokenize=True, **options):
        assert not tokenize
        return f"[{messages[0]['content']}]"


@pytest.fixture(scope="module")
def tokenizer():
    return TokenizerWrapper(Characters())


@pytest.fixture(scope="module")
def haystack(text, tokenizer):
    return haystacks.Haystack(text, tokenizer)


@pytest.fixture(scope="module")
def model():
    return tiny.make()


def cases_of(haystack, cells, n=2, seed=0):
    return {cell: haystacks.draw(haystack, cell, n, seed) for cell in cells}


def test_sentences_end_where_a_sentence_does():
    text = (
        'I saw Mr. Pip\nat 3 p.m. on it. "Why?" He\nleft.\n\nChapter 2\n\nJ. B. came!  '
    )
    assert haystacks.sentences(text) == [
        "I saw Mr. Pip at 3 p.m. on it.",
        ' "Why?"',
        " He left.",
        "\n\nChapter 2\n\nJ. B. came!",
    ]


@pytest.mark.parametrize("kind", haystacks.KINDS)
@pytest.mark.parametrize("depth", [*DEPTHS, 0.77])
def test_the_needle_stands_at_the_boundary_nearest_to_its_depth(tokenizer, kind, depth):
    lines = [f"Line {i} has{' words' * (i * 7 % 11)}." for i in range(200)]
    haystack = haystacks.Haystack(" ".join(lines), tokenizer)
    for case in haystacks.draw(haystack, haystacks.Cell(kind, 1500, depth), 5, 0):
        before, after = (s.strip() for s in case.text.split(case.fact.needle))
        whole = f"{before} {after}".strip()
        assert whole in " ".join(lines)
        ends = [0, *(m.end() for m in re.finditer(r"\.", whole))]
        assert len(ends) > 20
        # Characters are tokens here; the blanks at the seams make two of them.
        missed = min(abs(end - depth * len(whole)) for end in ends)
        assert len(before) in ends
        assert abs(len(before) - depth * len(whole)) <= missed + 2


def test_depth_0_is_the_start_and_1_the_end(haystack):
    for depth, method in ((0.0, "startswith"), (1.0, "endswith")):
        cases = haystacks.draw(haystack, haystacks.Cell("digits", 600, depth), 3, 0)
        assert all(getattr(c.text, method)(c.fact.needle) for c in cases)


@pytest.mark.parametrize("length", [400, 1500, 4000])
def test_the_length_is_honoured_within_a_few_tokens(haystack, tokenizer, length):
    for kind in haystacks.KINDS:
        for case in haystacks.draw(haystack, haystacks.Cell(kind, length, 0.5), 5, 0):
            n = len(tokenizer.encode(case.text, add_special_tokens=False))
            # A word may be cut off or not.
            assert abs(n - length) <= 10


@pytest.mark.real_model
@pytest.mark.parametrize("length", [200, 700])
def test_the_length_is_honoured_by_a_real_tokenizer(demo, text, length):
    haystack = haystacks.Haystack(text, demo[1])
    for kind in haystacks.KINDS:
        for case in haystacks.draw(haystack, haystacks.Cell(kind, length, 0.5), 5, 0):
            n = len(demo[1].encode(case.text, add_special_tokens=False))
            assert abs(n - length) <= 4
            assert (
                demo[1]
                .decode(case.prompt)
                .endswith(f"<|im_start|>assistant\n{case.fact.opening}")
            )
            assert demo[1].decode(case.answer) == f" {case.fact.answer}"


def test_a_tokenizer_that_begins_every_text_with_a_blank_counts_right(text):
    class Blank(Characters):
        def encode(self, text, add_special_tokens=True):
            return [5, *super().encode(text, add_special_tokens)]

    plain, blank = (haystacks.Haystack(text, t()) for t in (Characters, Blank))
    assert (plain.ends == blank.ends).all()


def test_an_answer_that_grows_into_the_prompt_is_told_apart(haystack):
    class Pairs(Characters):
        def encode(self, text, add_special_tokens=True):
            assert not add_special_tokens
            pairs = (text[i : i + 2] for i in range(0, len(text), 2))
            return [hash(pair) for pair in pairs]

    fact = haystacks.Fact("What?", "It is", "so")
    for text in ("even", "odd"):
        prompt, answer = haystacks._prompt(Pairs(), fact, text)
        whole = Pairs().apply_chat_template(
            [{"content": haystacks._PROMPT.format(text, "What?")}], tokenize=False
        )
        assert prompt + answer == Pairs().encode(f"{whole}It is so", False)
        assert len(answer) == 2


def test_a_seed_gives_the_same_cases_whatever_else_is_drawn(haystack):
    cell = haystacks.Cell("sentence", 800, 0.5)
    cases = haystacks.draw(haystack, cell, 4, seed=1)
    assert haystacks.draw(haystack, cell, 2, seed=1) == cases[:2]
    around = [case.text.replace(case.fact.needle, "") for case in cases]
    assert len(set(around)) == 4
    others = haystacks.draw(haystack, cell, 4, seed=2)
    assert not {case.text for case in cases} & {case.text for case in others}
    deeper = haystacks.draw(haystack, cell._replace(depth=0.75), 4, seed=1)
    assert not {c.fact for c in cases} & {c.fact for c in deeper}


@pytest.mark.parametrize(
    ("answer", "said", "hit"),
    [
        ("48213", "48213.", True),
        ("48213", "It is 48,213, I think", True),
        ("48213", "148213", False),
        ("48213", "4821", False),
        ("48213", "", False),
        ("eat a plum under the bridge", "EAT the plum at a bridge!", True),
        ("eat a plum under the bridge", "eat a plum", False),
        ("eat a plum under the bridge", "eat a plump bridge", False),
    ],
)
def test_a_hit_has_every_word_that_counts(answer, said, hit):
    assert haystacks.Fact("?", "It is", answer).is_hit(said) is hit


def test_every_fact_has_words_that_count_and_asks_for_them():
    rng = random.Random(0)
    for draw in haystacks.KINDS.values():
        for _ in range(50):
            fact = draw(rng)
            assert fact.is_hit(fact.needle)
            assert not fact.is_hit(fact.question + fact.opening)
            assert fact.needle == f"{fact.opening} {fact.answer}."


@pytest.mark.parametrize("setting", [FULL, TOVA, WINDOW], ids=str)
@pytest.mark.parametrize("step", [7, 5000])
def test_a_prompt_read_once_gives_what_two_readings_give(
    model, tokenizer, haystack, setting, step
):
    (case,) = haystacks.draw(haystack, haystacks.Cell("digits", 160, 0.5), 1, 0)
    read = []
    got = needle.ask(model, tokenizer, case, setting, step, read.append)
    tokens = tiny.mx.array([case.prompt + case.answer])
    n = len(case.prompt)
    losses = reading.token_losses(model, tokens, setting, 64, first=n)
    assert losses.shape == (1, len(case.answer))
    np.testing.assert_allclose(got.log_probability, -losses.mean(), rtol=1e-4)
    most = len(case.answer) + needle.SLACK
    cache = reading.new_cache(model, setting)
    want = reading.answer(model, tokenizer, case.prompt, cache, 64, most)
    assert got.said == want
    assert sum(read) == n - 1


CELLS = [haystacks.Cell("digits", 128, d) for d in (0.0, 1.0)]
WANTED = [FULL, TOVA, WINDOW]
COMMON = {"model": "tiny", "seed": 0}


def needle_of(directory, haystack):
    return needle.Needle(
        Results(directory, COMMON, ("model", "seed")), cases_of(haystack, CELLS), 64
    )


def test_a_killed_run_goes_on_with_the_rows_that_are_missing(
    model, tokenizer, haystack, tmp_path, monkeypatch
):
    asked = []
    right = needle.ask

    def ask(model, tokenizer, case, setting, *rest):
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append((case.text, setting))
        return right(model, tokenizer, case, setting, *rest)

    monkeypatch.setattr(needle, "ask", ask)
    measured = needle_of(tmp_path, haystack)
    whole = measured.to_read(WANTED)
    with pytest.raises(KeyboardInterrupt):
        list(measured.run(model, tokenizer, WANTED))
    file = tmp_path / "results.jsonl"
    assert len(file.read_text().splitlines()) == 3
    # Killed while it wrote the third row.
    file.write_text(file.read_text()[:-20])

    monkeypatch.setattr(needle, "ask", right)
    again = []

    def count(model, tokenizer, case, setting, *rest):
        again.append((case.text, setting))
        return right(model, tokenizer, case, setting, *rest)

    monkeypatch.setattr(needle, "ask", count)
    measured = needle_of(tmp_path, haystack)
    read = []
    to_read = measured.to_read(WANTED)
    rows = list(measured.run(model, tokenizer, WANTED, read.append))
    assert sum(read) == to_read < whole
    assert len(again) == 2 * (6 - 2)
    assert not set(asked[:4]) & set(again)
    on_disk = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(on_disk) == len(rows) == 6
    assert json.loads(json.dumps(rows)) == on_disk
    # All settings were asked the same.
    texts = {s: {t for t, x in asked[:4] + again if x == s} for s in WANTED}
    assert texts[FULL] == texts[TOVA] == texts[WINDOW]
    assert len(texts[FULL]) == 4


def test_the_summary_is_over_all_cells():
    def row(kind, value, *log_probabilities):
        return {
            "policy": "tova",
            "max_kv_size": 8,
            "kind": kind,
            "value": value,
            "n": 2,
            "log_probabilities": log_probabilities,
        }

    digits, sentence = needle.summary(
        [
            row("digits", 0.5, -1, -2),
            row("sentence", 0, -9, -9),
            row("digits", 1, 0, -1),
        ]
    )
    assert digits["n"] == 4
    assert digits["value"] == 0.75
    assert digits["stderr"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)
    assert digits["mean_log_probability"] == -1
    assert digits["mean_log_probability_stderr"] == pytest.approx((2 / 3) ** 0.5 / 2)
    low, high = digits["interval"]
    assert 0 < low < 0.75 < high < 1
    assert sentence["mean_log_probability"] == -9
    assert sentence["interval"][0] == 0


@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_plot_has_a_panel_per_setting(n, tmp_path, monkeypatch):
    figures = []
    save = needle.save
    monkeypatch.setattr(
        needle, "save", lambda f, path: figures.append(f) or save(f, path)
    )
    wanted = settings(("tova", "vatp", "window"), (128, 256))[:n]
    rows = [
        {
            **setting._asdict(),
            **COMMON,
            "text": "a novel",
            "kind": kind,
            "length": length,
            "depth": depth,
            "value": 0.5,
            "mean_log_probability": i - 8 - depth - (kind == "digits"),
        }
        for i, setting in enumerate(wanted)
        for kind in haystacks.KINDS
        for length in (512, 1024)
        for depth in DEPTHS
        # One cell is missing yet.
        if (setting, length, depth) != (wanted[-1], 1024, 1.0)
    ]
    path = needle.plot(rows, tmp_path / "needle.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert path.stat().st_size > 10_000
    panels = [axes for axes in figures[0].axes if axes.images and axes.get_title()]
    assert [axes.get_title() for axes in panels] == [str(s) for s in wanted]
    # The mean over kinds, depth by length.
    got = panels[0].images[0].get_array()
    np.testing.assert_allclose(got[:, 0], [-8.5 - d for d in DEPTHS])
    assert got.shape == (4, 2)
    assert panels[-1].images[0].get_array().mask[3, 1]
    assert {axes.images[0].get_clim() for axes in panels} == {(-9.5, 0)}
    assert "nats" in figures[0].axes[-1].get_ylabel()
    assert "log-probability" in figures[0].get_suptitle()


def run(*arguments):
    return CliRunner().invoke(main, ["eval", "needle", *map(str, arguments)])


@pytest.fixture
def command(tmp_path, text, model, tokenizer, monkeypatch):
    """A function that runs `eval needle` with the tiny model."""
    novel = tmp_path / "novel.txt"
    novel.write_text(text, encoding="utf-8")

    def start(*arguments, tokenizer=tokenizer):
        loaded = (model, tokenizer, "/models/tiny")
        monkeypatch.setattr(models, "load", lambda name: loaded)
        return run("--text", novel, "--out", tmp_path / "out", *arguments)

    return start


SMALL = ("--policy", "tova", "--max-kv-size", 24, "--cases", 2, "--depth", 0.5)
SMALL += ("--length", 400, "--length", 500)
INTERFACE = "task policy max_kv_size value unit n stderr model dtype tokens seed"
INTERFACE += " prefill_step_size versions device command date interval kind length"
INTERFACE += " depth mean_log_probability mean_log_probability_stderr"


def test_the_command_gives_a_table_rows_and_a_plot(command, tmp_path):
    result = command(*SMALL)
    assert result.exit_code == 0, (result.stderr, result.exception)
    lines = result.stdout.splitlines()
    assert lines[0].split()[:4] == ["policy", "size", "kind", "accuracy"]
    assert [line.split()[0] for line in lines[1:]] == ["full", "tova"] * 2
    out = tmp_path / "out"
    assert (out / "needle.png").stat().st_size > 10_000
    written = (out / "results.jsonl").read_text()
    # Two settings, two kinds, two lengths.
    rows = [json.loads(line) for line in written.splitlines()]
    assert len(rows) == 8
    for row in rows:
        assert not set(INTERFACE.split()) - row.keys()
        assert (row["task"], row["unit"], row["n"]) == ("needle", "accuracy", 2)
        assert row["tokens"] > row["length"]
    again = command(*SMALL, "--json")
    got = json.loads(again.stdout)
    assert (out / "results.jsonl").read_text() == written
    assert got["rows"] == rows
    assert [s["n"] for s in got["summary"]] == [4] * 4
    # Another seed is another run.
    assert command(*SMALL, "--seed", 1).exit_code == 0
    assert len((out / "results.jsonl").read_text().splitlines()) == 16


def test_the_help_names_the_kinds_that_there_are():
    parameters = evaluation.commands["needle"].params
    option: Any = next(p for p in parameters if p.name == "kinds")
    assert list(option.type.choices) == list(haystacks.KINDS)


def one_line(result, message):
    assert result.exit_code == 1, (result.stderr, result.exception)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


@pytest.mark.parametrize("depth", [-0.1, 1.5, "nan"])
def test_a_depth_that_is_no_share_is_refused(command, depth):
    result = command("--depth", depth)
    assert result.exit_code == 2
    assert f"'--depth': {depth} is not" in result.stderr


@pytest.mark.parametrize("length", [1, 60])
def test_a_length_without_room_for_the_fact_is_refused(command, length):
    one_line(command("--length", length), f"--length {length} leaves no room")


def test_a_text_that_is_too_short_is_refused(command):
    one_line(command("--length", 100_000), "Give a longer text")


def test_an_empty_text_is_refused(tokenizer):
    with pytest.raises(EvaluationError, match="has 0 tokens"):
        haystacks.Haystack(" \n\n", tokenizer).hide("It.", 100, 0.5, random.Random(0))


def test_a_model_without_chat_template_is_refused(command):
    class Untold(Characters):
        chat_template = None
        has_chat_template = False

    one_line(command(tokenizer=Untold()), "tiny has no chat template")


@pytest.mark.real_model
def test_the_full_cache_finds_what_a_window_has_lost(demo, text):
    model, tokenizer = demo
    haystack = haystacks.Haystack(text, tokenizer)
    cases = haystacks.draw(haystack, haystacks.Cell("digits", 300, 0.0), 2, 0)
    for case in cases:
        full, window = (
            needle.ask(model, tokenizer, case, setting, 256)
            for setting in (FULL, Setting("window", 128))
        )
        assert full.hit
        assert not window.hit
        assert full.log_probability > -0.5 > -1.5 > window.log_probability
