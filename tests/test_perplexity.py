"""Perplexity: what token by token gives, resumable, paired, and a figure."""

import errno
import itertools
import json
import math
import os
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from tova_mlx import POLICIES
from tova_mlx.cli import main
from tova_mlx.errors import EvaluationError
from tova_mlx.evaluation.perplexity import Perplexity, cut, plot
from tova_mlx.evaluation.reading import new_cache, token_losses
from tova_mlx.evaluation.results import Results, Setting, settings
from tova_mlx.evaluation.statistics import mean_with_error, wilson

COMMON = {
    "model": "tiny",
    "dtype": "float32",
    "text": "noise",
    "tokens": 600,
    "context": 300,
    "prefill_step_size": 64,
}
RESULTS = Path(__file__).parents[1] / "results"
SAME = ("model", "dtype", "text", "tokens", "context")
SETTINGS = settings(("streaming", "fade", "tova", "full"), (16, 64, 16))


@pytest.fixture(scope="module")
def model():
    return tiny.make()


@pytest.fixture
def windows():
    return cut(tiny.tokens(700)[0].tolist(), 300, 650)


def measure(model, windows, directory, step=64, progress=None):
    results = Results(directory, COMMON, SAME)
    perplexity = Perplexity(results, windows, step)
    return perplexity, list(perplexity.run(model, SETTINGS, progress))


def one_by_one(model, tokens, setting):
    """Losses of a row of tokens, fed one at a time, in float64."""
    cache, losses = new_cache(model, setting), []
    for token, following in itertools.pairwise(tokens):
        logits = model(mx.array([[token]]), cache=cache)[0, -1]
        values = np.array(logits, np.float64)
        losses.append(np.log(np.exp(values - values.max()).sum()) + values.max())
        losses[-1] -= values[following]
    return np.array(losses)


def test_settings_have_full_and_tova_first_and_nothing_twice():
    assert [s[:2] for s in SETTINGS] == [
        ("full", None),
        ("tova", 16),
        ("streaming", 16),
        ("fade", 16),
        ("tova", 64),
        ("streaming", 64),
        ("fade", 64),
    ]


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[1], SETTINGS[3]])
@pytest.mark.parametrize("step", [1, 7, 300])
def test_losses_are_those_of_token_by_token(model, windows, setting, step):
    rows = windows[:, :120]
    got = token_losses(model, mx.array(rows), setting, step)
    want = np.array([one_by_one(model, row.tolist(), setting) for row in rows])
    np.testing.assert_allclose(got, want, atol=1e-4)
    some = token_losses(model, mx.array(rows), setting, step, first=100)
    np.testing.assert_allclose(some, got[:, 99:], atol=1e-5)


def test_rows_say_what_was_measured(model, windows, tmp_path):
    read = []
    perplexity, rows = measure(model, windows, tmp_path, progress=read.append)
    assert sum(read) == len(SETTINGS) * 2 * 299
    assert [(r["policy"], r["max_kv_size"]) for r in rows] == [s[:2] for s in SETTINGS]
    full, tova = rows[:2]
    losses = token_losses(model, mx.array(windows), SETTINGS[0], 64)
    assert full["value"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert full["n"] == 2 * 299
    assert "ratio_to_full" not in full
    ratio = tova["value"] / full["value"]
    assert tova["ratio_to_full"] == pytest.approx(ratio, rel=1e-5)
    assert "ratio_to_tova" not in tova
    assert rows[2]["ratio_to_tova"] == pytest.approx(rows[2]["value"] / tova["value"])
    assert perplexity.compare(SETTINGS[1], SETTINGS[1]) == (1, 0)
    buckets = full["by_position"]
    edges = [(b["from"], b["to"]) for b in buckets]
    assert edges == [(1, 63), (64, 127), (128, 255), (256, 299)]
    middle = math.exp(losses[:, 63:127].mean())
    assert buckets[1]["perplexity"] == pytest.approx(middle, rel=1e-5)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_a_killed_run_goes_on_where_it_was(model, windows, tmp_path, monkeypatch):
    calls = []

    def killed(*arguments):
        calls.append(arguments[2])
        if len(calls) > 5:
            raise KeyboardInterrupt
        return token_losses(*arguments)

    monkeypatch.setattr("tova_mlx.evaluation.perplexity.token_losses", killed)
    with pytest.raises(KeyboardInterrupt):
        measure(model, windows, tmp_path)
    path = tmp_path / "results.jsonl"
    written = path.read_text()
    assert written.count("\n") == 2
    path.write_text(written + '{"model": "ti')
    calls.clear()
    monkeypatch.setattr(
        "tova_mlx.evaluation.perplexity.token_losses",
        lambda *arguments: calls.append(arguments[2]) or token_losses(*arguments),
    )
    _, rows = measure(model, windows, tmp_path)
    assert [c for c in dict.fromkeys(calls)] == SETTINGS[2:]
    assert path.read_text().startswith(written)
    assert len(rows) == len(path.read_text().splitlines()) == len(SETTINGS)
    calls.clear()
    measure(model, windows, tmp_path)
    assert calls == []


@pytest.mark.parametrize("left", [b"", b"\x93NUM", b"no array at all"])
def test_losses_that_are_no_array_are_measured_again(model, windows, tmp_path, left):
    _, rows = measure(model, windows, tmp_path)
    for path in tmp_path.rglob("*.npy"):
        path.write_bytes(left)
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:-1]))
    again, got = measure(model, windows, tmp_path)
    assert got[-1]["ratio_to_full"] == pytest.approx(rows[-1]["ratio_to_full"])
    assert math.isfinite(again.compare(SETTINGS[-1], SETTINGS[0])[0])


def test_losses_that_cannot_be_saved_are_one_line(
    model, windows, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        said = r"full\.npy: cannot be written \(No space"
        with pytest.raises(EvaluationError, match=said):
            measure(model, windows, tmp_path)
    assert not (tmp_path / "results.jsonl").exists()
    assert not list(tmp_path.rglob("*.npy"))
    assert len(measure(model, windows, tmp_path)[1]) == len(SETTINGS)


def test_rows_without_losses_are_read_again_only_for_new_rows(model, windows, tmp_path):
    perplexity, rows = measure(model, windows, tmp_path)
    for file in tmp_path.glob("losses/*/*.npy"):
        file.unlink()
    assert perplexity.missing(SETTINGS) == []
    path = tmp_path / "results.jsonl"
    assert SETTINGS[4][:2] == ("tova", 64)
    assert SETTINGS[6][:2] == ("fade", 64)
    without = [r for r in rows if (r["policy"], r["max_kv_size"]) != SETTINGS[6][:2]]
    path.write_text("".join(json.dumps(row) + "\n" for row in without))
    results = Results(tmp_path, COMMON, SAME)
    perplexity = Perplexity(results, windows, 64)
    wanted = [SETTINGS[0], SETTINGS[4], SETTINGS[6]]
    assert perplexity.missing(SETTINGS) == wanted
    again = list(perplexity.run(model, SETTINGS))
    assert again == rows
    assert len(path.read_text().splitlines()) == len(SETTINGS)


def test_losses_of_another_text_are_not_taken(model, windows, tmp_path):
    perplexity, _ = measure(model, windows, tmp_path)
    other = Results(tmp_path, {**COMMON, "text": "other"}, SAME)
    assert other.rows() == []
    assert Perplexity(other, windows, 64).missing(SETTINGS) == SETTINGS
    assert perplexity.missing(SETTINGS) == []


def test_the_figure_has_a_line_for_every_policy(model, windows, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, rows = measure(model, windows, tmp_path)
    path = plot(rows, tmp_path / "perplexity.png")
    image = pyplot.imread(path)
    assert image.std() > 0.05
    assert image.shape[0] > 500
    assert not pyplot.get_fignums()


def test_a_policy_that_is_far_off_does_not_flatten_the_changes(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(
        "tova_mlx.evaluation.perplexity.save", lambda figure, _: figures.append(figure)
    )
    full = {**COMMON, "policy": "full", "max_kv_size": None, "value": 40, "stderr": 1}
    rows = [full]
    for policy, change in (("tova", 0.06), ("h2o", 0.08), ("window", 3.5)):
        row = {**full, "policy": policy, "max_kv_size": 64, "value": 40 * (1 + change)}
        rows.append({**row, "ratio_to_full": 1 + change, "ratio_to_full_stderr": 0.02})
    plot(rows, tmp_path)
    plot(rows[:1], tmp_path)
    (_, changes), alone = (figure.axes for figure in figures)
    assert len(alone) == 1
    low, high = changes.get_ylim()
    assert low < 0 < 8 < high < 20
    labels = {line.get_label() for line in changes.containers}
    assert labels == {"tova", "h2o", "window"}
    assert "(%)" in changes.get_ylabel()


def test_any_number_of_policies_can_be_told_apart(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(
        "tova_mlx.evaluation.perplexity.save", lambda figure, _: figures.append(figure)
    )
    full = {**COMMON, "policy": "full", "max_kv_size": None, "value": 40, "stderr": 1}
    rows = [full]
    names = [*(p for p in POLICIES if p != "full"), *(f"own-{i}" for i in range(5))]
    for name, size in itertools.product(names, (64, 128)):
        row = {**full, "policy": name, "max_kv_size": size, "value": 44}
        rows.append({**row, "ratio_to_full": 1.1, "ratio_to_full_stderr": 0.01})
    plot(rows, tmp_path)
    lines = [c.lines[0] for c in figures[0].axes[0].containers]
    looks = {(x.get_color(), x.get_marker(), x.get_linestyle()) for x in lines}
    assert len(looks) == len(lines) >= 12


def test_bits_are_settings_and_older_rows_stay(model, tmp_path):
    wide, windows = tiny.make(head_dim=32), cut(tiny.tokens(70)[0].tolist(), 35, 70)
    plain = settings(("tova",), (16,))
    bits = settings(("tova",), (16,), [((8, 8), 32), ((4, 4), 32)])
    assert [str(s) for s in bits] == [
        *("full", "tova 16", "tova 16 8-bit g32", "tova 16 4-bit g32")
    ]
    first = Perplexity(Results(tmp_path, COMMON, SAME), windows, 64)
    older = list(first.run(wide, plain))
    assert not any("kv_bits" in row for row in older)
    again = Perplexity(Results(tmp_path, COMMON, SAME), windows, 64)
    assert [s.kv_bits for s in again.missing(bits)] == [(8, 8), (4, 4)]
    rows = list(again.run(wide, bits))
    assert rows[:2] == older
    assert [tuple(row["kv_bits"]) for row in rows[2:]] == [(8, 8), (4, 4)]
    assert all(row["kv_group_size"] == 32 for row in rows[2:])
    exact, eight, four = (row["value"] for row in rows[1:])
    assert 0 < abs(eight - exact) < abs(four - exact)


@pytest.mark.parametrize("name", ["perplexity", "needle", "kept", "longrange"])
def test_committed_rows_are_still_found_by_their_settings(tmp_path, name):
    lines = (RESULTS / name / "results.jsonl").read_text(encoding="utf-8")
    (tmp_path / "results.jsonl").write_text(lines, encoding="utf-8")
    for row in map(json.loads, lines.splitlines()):
        same = ("model", "dtype") if name == "longrange" else ("model", "text_sha256")
        results = Results(tmp_path, row, same)
        assert row in results.rows(task=row["task"], **Setting.of(row)._asdict())
        eight = Setting.of(row)._replace(kv_bits=(8, 8), kv_group_size=64)
        assert not results.rows(task=row["task"], **eight._asdict())


def test_committed_perplexities_are_not_measured_again(tmp_path):
    lines = (RESULTS / "perplexity" / "results.jsonl").read_text(encoding="utf-8")
    (tmp_path / "results.jsonl").write_text(lines, encoding="utf-8")
    rows = [json.loads(line) for line in lines.splitlines()]
    windows = np.zeros((rows[0]["tokens"] // rows[0]["context"], rows[0]["context"]))
    results = Results(tmp_path, rows[0], (*SAME, "text_sha256"))
    measured = Perplexity(results, windows.astype(np.int32), 256)
    sizes = sorted({row["max_kv_size"] for row in rows if row["max_kv_size"]})
    wanted = settings([row["policy"] for row in rows], sizes)
    assert len(wanted) == len(rows)
    assert measured.missing(wanted) == []
    assert list(measured.run(None, wanted, began=pytest.fail)) != []
    # What is new is measured, and what it is paired with read for its losses.
    bits = [*wanted, Setting("fade", 64, (8, 8), 64)]
    pairs = [Setting("full", None), Setting("fade", 64), bits[-1]]
    assert measured.missing(bits) == pairs


def test_a_text_too_short_is_refused():
    with pytest.raises(EvaluationError, match="less than one context of 300"):
        cut(list(range(299)), 300, 1000)
    assert cut(list(range(901)), 300, 650).shape == (2, 300)


def test_what_is_no_results_file_is_refused(tmp_path):
    (tmp_path / "results.jsonl").write_text("not a row\n")
    with pytest.raises(EvaluationError, match="no row of an evaluation"):
        Results(tmp_path, COMMON, SAME)
    with pytest.raises(EvaluationError, match="cannot be used"):
        Results(tmp_path / "results.jsonl", COMMON, SAME)


def test_errors_allow_for_neighbours_that_are_alike():
    rng = np.random.default_rng(0)
    independent = rng.standard_normal(64_000)
    alike = np.repeat(rng.standard_normal(2000), 32)
    mean, error = mean_with_error(independent)
    assert error == pytest.approx(1 / math.sqrt(64_000), rel=0.1)
    assert abs(mean) < 4 * error
    assert mean_with_error(alike)[1] == pytest.approx(1 / math.sqrt(2000), rel=0.1)
    assert math.isnan(mean_with_error([1.0, 2.0])[1])
    low, high = wilson(10, 10)
    assert (round(low, 2), high) == (0.72, 1)
    assert wilson(0, 10)[0] == 0


def test_memory_does_not_grow_with_the_text(model):
    peaks = []
    for n in (2000, 8000):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        token_losses(model, tiny.tokens(n), Setting("tova", 64), 64)
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 1.2 * peaks[0]


def test_the_losses_are_mlx_lms_own(model, windows):
    tokens = mx.array(windows)
    want = nn.losses.cross_entropy(model(tokens)[:, :-1], tokens[:, 1:])
    got = token_losses(model, tokens, SETTINGS[0], 64)
    np.testing.assert_allclose(got, np.array(want), atol=1e-4)


def run(*arguments):
    return CliRunner().invoke(main, ["eval", "perplexity", *map(str, arguments)])


@pytest.mark.real_model
def test_the_command_measures_and_goes_on(demo_path, text, tmp_path):
    novel = tmp_path / "novel.txt"
    novel.write_text(text, encoding="utf-8")
    options = ["--model", demo_path, "--tokens", 256, "--context", 128]
    options += ["--policy", "tova", "--max-kv-size", 32, "--out", tmp_path / "out"]
    done = run(novel, *options, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    needed = "task policy max_kv_size value unit n stderr model dtype tokens seed"
    needed += " prefill_step_size versions device command date"
    assert all(set(needed.split()) <= set(row) for row in rows)
    assert rows[0]["value"] < rows[1]["value"] < 3 * rows[0]["value"]
    again = run(novel, *options, "--policy", "fade")
    assert again.exit_code == 0, again.output
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(x)["policy"] for x in lines] == ["full", "tova", "fade"]
    assert [json.loads(x) for x in lines[:2]] == rows
    assert "fade          32" in again.stdout
    assert (tmp_path / "out" / "perplexity.png").stat().st_size > 10_000


def test_bad_input_is_one_line(tmp_path):
    novel = tmp_path / "novel.txt"
    novel.write_bytes(b"\xff\xfe")
    done = run(novel, "--out", tmp_path)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "it is not UTF-8" in done.stderr
