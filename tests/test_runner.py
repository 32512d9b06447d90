"""What the evaluations do alike: figures of stopped runs, one object, bits."""

import json
import os

import click
import pytest
from click.testing import CliRunner

from tova_mlx.cli import main
from tova_mlx.cli.evaluation import runner
from tova_mlx.cli.evaluation.options import quantised
from tova_mlx.errors import EvaluationError
from tova_mlx.evaluation.results import Results


def evaluation(directory, rows, drawn, stop=None):
    def measure(advance, say):
        for i, row in enumerate(rows):
            if i == stop:
                raise KeyboardInterrupt
            say("row", i)
            advance(1)
            yield row

    def plot(done, path):
        drawn.append((list(done), path.name))
        return path if done[-1] > 1 else None

    results = Results(directory, {}, ())
    return runner.Evaluation(
        "tried", results, len(rows), measure, plot, table=lambda done: f"{sum(done)}"
    )


def test_a_run_draws_once_and_prints_a_table_or_an_object(tmp_path, capsys):
    drawn = []
    evaluation(tmp_path, [1, 2, 3], drawn).run(as_json=False)
    assert drawn == [([1, 2, 3], "tried.png")]
    assert capsys.readouterr().out == "6\n"
    evaluation(tmp_path, [3], drawn).run(as_json=True)
    path = str(tmp_path / "results.jsonl")
    figure = str(tmp_path / "tried.png")
    assert json.loads(capsys.readouterr().out) == {
        "rows": [3],
        "path": path,
        "plot": figure,
    }
    evaluation(tmp_path, [1], drawn).run(as_json=True)
    assert json.loads(capsys.readouterr().out)["plot"] is None


@pytest.mark.parametrize(("stop", "figures"), [(2, [([1, 2], "tried.png")]), (0, [])])
def test_a_stopped_run_draws_what_it_has(tmp_path, stop, figures):
    drawn = []
    with pytest.raises(KeyboardInterrupt):
        evaluation(tmp_path, [1, 2, 3], drawn, stop).run(as_json=False)
    assert drawn == figures


def test_what_stopped_a_run_is_said_and_not_that_it_could_not_be_drawn(tmp_path):
    def full(done, path):
        raise EvaluationError("the figure cannot be written")

    stopped = evaluation(tmp_path, [1, 2, 3], [], stop=2)
    stopped.plot = full
    with pytest.raises(KeyboardInterrupt):
        stopped.run(as_json=False)
    whole = evaluation(tmp_path, [1, 2, 3], [])
    whole.plot = full
    with pytest.raises(EvaluationError, match="figure cannot be written"):
        whole.run(as_json=False)


def test_a_directory_that_cannot_be_written_is_refused_before_any_work(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(EvaluationError, match="cannot be used"):
        Results(tmp_path, {}, ())


def test_a_long_run_draws_now_and_then(tmp_path, monkeypatch):
    drawn, clock = [], iter(range(0, 1000, 20))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(clock))
    evaluation(tmp_path, [1, 2, 3, 4], drawn).run(as_json=False)
    assert 1 < len(drawn) < 5
    assert drawn[-1][0] == [1, 2, 3, 4]


def test_every_bit_width_is_measured_in_every_group_size():
    both = {"kv_bits": (8, (8, 4)), "kv_group_sizes": ("32", "64")}
    assert quantised(both) == [
        *((("8h", 8), 32), (("8h", 8), 64)),
        *(((8, 4), 32), ((8, 4), 64)),
    ]
    # What a single number is goes into the rows, not the number.
    assert quantised({"kv_bits": (4,), "kv_group_sizes": ()}) == [(("6h", 4), 64)]
    assert quantised({}) == []
    with pytest.raises(click.UsageError, match="does nothing without --kv-bits"):
        quantised({"kv_bits": (), "kv_group_sizes": ("32",)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kv-bits", "3"), "use 4, 5, 6, 8, or a pair like 6h,4 of 4, 5, 6, 8, 4h"),
        (("--kv-group-size", "32"), "--kv-group-size does nothing without --kv-bits"),
        (("--kv-bits", "8", "--kv-group-size", "48"), "'48' is not one of"),
    ],
)
def test_bits_that_cannot_work_are_refused_before_a_model_is_loaded(
    tmp_path, options, message
):
    text = tmp_path / "t.txt"
    text.write_text("x")
    arguments = ["eval", "perplexity", str(text), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*arguments, "--model", "/", *options])
    assert result.exit_code == 2
    assert message in result.stderr
