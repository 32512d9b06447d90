"""lm-evaluation-harness, through mlx-lm's bridge, on converted models."""

import json
import sys

import pytest
from click.testing import CliRunner
from test_tools import made  # noqa: F401  (a fixture)

from tova_mlx import convert, revert
from tova_mlx.caches.batch import BatchPolicyKVCache
from tova_mlx.cli import main

LIMIT = 24
QUESTIONS = (
    {
        "text": "The ship was called Pequod. Her captain, an old man with one leg of "
        "whalebone, had sworn to find the white whale that took the other.",
        "choices": ["A leg of ivory, white as the whale's", "An arm", "Nothing"],
    },
    {
        "text": "Queequeg, a harpooner from an island far away, sold shrunken heads in "
        "the town by day and slept beside Ishmael by night.",
        "choices": ["Bread", "Shrunken heads, and he had sold all but one", "Tea"],
    },
    {
        "text": "Nantucket is an island of sand. Its men went down to the sea with "
        "clams, then with cod, and in the end with whales.",
        "choices": ["Sheep", "Iron and coal from under the hills", "Whales"],
    },
)
KINDS = {
    "choosing": """
output_type: multiple_choice
doc_to_text: "{{text}} Which is it?"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "reading": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
- {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{text}} Tell it again."
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["The End"], max_gen_toks: 6}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}
pytestmark = [
    pytest.mark.real_model,
    # Of lm-eval, datasets and what they bring; not ours to fix.
    pytest.mark.filterwarnings("ignore:::(?!tova_mlx)"),
]


@pytest.fixture(autouse=True)
def tasks(tmp_path, monkeypatch):
    """Tasks in the working directory, with their data."""
    monkeypatch.chdir(tmp_path)
    # What mlx-lm sets for the whole process.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    data = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (tmp_path / "questions.jsonl").write_text(data)
    for name, rest in KINDS.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\n"
            "dataset_path: json\n"
            "dataset_kwargs: {data_files: {test: questions.jsonl}, cache_dir: cache}\n"
            f"test_split: test{rest}"
        )


@pytest.fixture
def bridge(demo, monkeypatch):
    """mlx-lm's bridge with the demo model."""
    from mlx_lm import evaluate

    monkeypatch.setattr(evaluate, "load", lambda *_, **__: demo)
    yield evaluate.MLXLM("demo", batch_size=2)
    revert(demo[0])


def answers(bridge):
    """What the harness was given for each question of each task."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model=bridge,
        tasks=[f"{name}.yaml" for name in KINDS],
        apply_chat_template=False,
        bootstrap_iters=0,
    )
    return {
        name: [sample["resps"] for sample in samples]
        for name, samples in found["samples"].items()
    }


def likelihoods(found):
    return [float(r[0][0]) for resps in found["choosing"] for r in resps] + [
        float(resps[0][0]) for resps in found["reading"]
    ]


@pytest.mark.parametrize("policy", ["tova", "vatp"])
def test_with_room_for_all_results_are_those_of_mlx_lm(bridge, policy):
    want = answers(bridge)
    convert(bridge._model, 512, policy=policy)
    got = answers(bridge)
    assert likelihoods(got) == pytest.approx(likelihoods(want), rel=1e-4)
    assert got["writing"] == want["writing"]
    convert(bridge._model, LIMIT, policy=policy)
    bounded = answers(bridge)
    for got, wanted in zip(likelihoods(bounded), likelihoods(want), strict=True):
        assert abs(got - wanted) > 0.01
    assert bounded["writing"] != want["writing"]


def test_every_score_comes_from_a_cache_within_the_limit(bridge, monkeypatch):
    read = []
    score, process = bridge._score_fn, bridge._process_prompt

    def note(caches):
        read.append({(c.positions.shape[-1], c.offset) for c in caches})

    def scored(inputs, cache=None):
        cache = cache or bridge._model.make_cache()
        result = score(inputs, cache=cache)
        note(cache)
        return result

    def processed(prompt):
        result = process(prompt)
        note(result[1])
        return result

    monkeypatch.setattr(bridge, "_score_fn", scored)
    monkeypatch.setattr(bridge, "_process_prompt", processed)
    convert(bridge._model, LIMIT)
    answers(bridge)
    # Three questions, their answers of more than a token, two batches read through.
    assert len(read) >= 3 + 4 + 2
    for ((size, offset),) in read:
        assert size == LIMIT < offset


@pytest.fixture
def batches(monkeypatch):
    """Tokens held by a batch's caches before each token, and whether all are full."""
    held = []
    update = BatchPolicyKVCache.update_and_fetch

    def noted(self, keys, values):
        if keys.shape[2] == 1:
            assert self.nbytes <= self.max_nbytes
            held.append((self.size(), min(self.offset.tolist()) > LIMIT))
        return update(self, keys, values)

    monkeypatch.setattr(BatchPolicyKVCache, "update_and_fetch", noted)
    return held


@pytest.mark.parametrize("name", KINDS)
def test_the_command_evaluates_with_bounded_caches(
    demo_path,
    made,  # noqa: F811
    batches,
    name,
):
    command = ["run", "--max-kv-size", str(LIMIT), "evaluate", "--model"]
    command += [str(demo_path), "--tasks", f"{name}.yaml", "--output-dir", "out"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert f"tova keeps {LIMIT} tokens per layer" in result.stderr
    assert f'"name": "{name}"' in result.stdout
    # Converting looks at what one token leaves.
    used = [c for caches in made for c in caches if c.offset > 1]
    held = {(c.positions.shape[-1], c.offset > LIMIT) for c in used} | set(batches)
    assert held == {(LIMIT, True)}
    assert bool(batches) == (name == "writing")


def test_without_the_harness_the_reason_is_one_line(monkeypatch, demo_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    command = ["run", "evaluate", "--model", str(demo_path), "--tasks", "x"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        'Error: mlx_lm.evaluate needs lm-eval. Run: pip install "tova_mlx[eval]"'
    ]


def test_a_task_that_is_not_there_is_one_line(demo_path):
    command = ["run", "--max-kv-size", str(LIMIT), "evaluate"]
    command += ["--model", str(demo_path), "--tasks", "no_such_task"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(
        "Error: lm-eval: Spec 'no_such_task' is not a registered task"
    )
