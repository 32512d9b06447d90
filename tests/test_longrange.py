"""eval longrange: tasks, prompts, scores, rows that survive a kill, the command."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from tova_mlx.cli import main
from tova_mlx.cli.evaluation.longrange import _table
from tova_mlx.errors import EvaluationError
from tova_mlx.evaluation import longrange, reading
from tova_mlx.evaluation.answers import Answers
from tova_mlx.evaluation.longrange import LongRange, Task, plot
from tova_mlx.evaluation.prompts import Prompt, Prompts, trained_context
from tova_mlx.evaluation.reading import answer, new_cache
from tova_mlx.evaluation.results import Results, Setting, settings
from tova_mlx.evaluation.scores import f1, mean_over, repetition, rouge_l
from tova_mlx.evaluation.stories import loss_under_full, tell
from tova_mlx.evaluation.tasks import Example, load_qasper, load_squality, load_story

DATA = Path(__file__).parents[2] / "shared" / "data"


def lines(path, *objects):
    path.write_text(
        "".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects),
        encoding="utf-8",
    )
    return str(path)


def story(document, *questions):
    return {
        "document": document,
        "questions": [
            {"question_text": q, "responses": [{"response_text": r} for r in refs]}
            for q, *refs in questions
        ],
    }


def paper(text, *pairs, **more):
    questions, answers = zip(*pairs, strict=True)
    return {"input": text, "instructions": questions, "outputs": answers, **more}


STORIES = (
    story("A fox.", ("Who?", "A fox.", "Reynard."), ("Why?", "Hunger.", "Joy.")),
    story("A hen.\u2028End.", ("What?", "A hen.", "A bird.")),
)
PAPERS = (
    paper("We count sheep.", ("What?", "sheep"), ("How?", "slowly"), evaluation="f1"),
    paper("We count goats.", ("What?", ["goats", "kids"]), ("What?", "some goats")),
    paper("We count sheep.", ("What?", "sheep"), evaluation="LLM"),
)


class Words:
    """A tokenizer of words, with a chat template."""

    has_chat_template = True

    def __init__(self):
        self.words = []

    def encode(self, text, **_):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids)

    def apply_chat_template(self, messages, **_):
        return f"<user> {messages[0]['content']} <assistant>"


# Tasks


def test_stories_give_their_first_questions_first(tmp_path):
    source = lines(tmp_path / "s.jsonl", *STORIES)
    examples = load_squality(source, 3)
    assert [e.question for e in examples] == ["Who?", "What?", "Why?"]
    assert [e.source for e in examples] == [0, 1, 0]
    assert examples[1].document == "A hen.\u2028End."
    assert examples[2].references == ("Hunger.", "Joy.")
    assert load_squality(source, 2) == examples[:2]
    assert load_squality(source, 2, 1) == [examples[0], examples[2]]


def test_papers_for_another_judge_are_left_out(tmp_path):
    source = lines(tmp_path / "q.jsonl", *PAPERS)
    examples = load_qasper(source, 99)
    assert [(e.source, e.question) for e in examples] == [
        (0, "What?"),
        (1, "What?"),
        (0, "How?"),
    ]
    assert load_qasper(source, 99, 1) == [examples[0], examples[2]]
    assert examples[0].references == ("sheep",)
    assert examples[1].references == ("goats", "kids", "some goats")


def written(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]


def without(record, name):
    return {k: v for k, v in record.items() if k != name}


@pytest.mark.parametrize(
    ("load", "record", "message"),
    [
        (load_squality, PAPERS[0], "line 2: no field 'document'. SQuALITY has"),
        (load_squality, without(STORIES[0], "questions"), "no field 'questions'"),
        (load_squality, story("x", ("Why?",)), "line 2, questions 1: 'responses' is"),
        (load_squality, {**STORIES[0], "questions": [1]}, "questions 1: int, not an"),
        (load_squality, {**STORIES[0], "document": 3}, "'document' is no str"),
        (load_qasper, STORIES[0], "line 2: no field 'input'. L-Eval's QASPER has"),
        (load_qasper, without(PAPERS[0], "outputs"), "line 2: no field 'outputs'"),
        (load_qasper, {**PAPERS[0], "outputs": ["x"]}, "2 instructions and 1 outputs"),
        (load_qasper, paper("x", ("Why?", 7)), "'outputs' is no list"),
        (load_qasper, paper("x", ("Why?", [7])), "'outputs' is not all text"),
        (load_qasper, [1], "line 2: list, not an object"),
    ],
)
def test_a_wrong_line_is_named_with_what_it_lacks(tmp_path, load, record, message):
    good = STORIES[0] if load is load_squality else PAPERS[0]
    source = lines(tmp_path / "x.jsonl", good, record)
    with pytest.raises(EvaluationError) as refused:
        load(source, 8)
    assert message in refused.value.line
    assert "x.jsonl" in refused.value.line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"input": "x"', "line 1: not JSON"),
        ("naïve".encode("latin-1"), "it is not UTF-8"),
        (json.dumps(PAPERS[2]).encode(), "no line is scored by F1"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        load_qasper(str(tmp_path / "x.jsonl"), 8)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with repositories of these names, and one that cannot be reached."""
    files = {
        "who/one": ["README.md", "data/dev.jsonl"],
        "who/two": ["a.jsonl", "b.jsonl"],
        "who/none": ["README.md"],
    }
    local = lines(tmp_path / "dev.jsonl", *PAPERS)

    def listed(self, repository, repo_type):
        assert repo_type == "dataset"
        return files[repository]

    def fetched(repository, name, repo_type):
        assert repo_type == "dataset"
        if name not in files.get(repository, []):
            raise OSError(f"No {name}.\nA long story.")
        return local

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)


@pytest.mark.parametrize("source", ["who/one", "who/one/data/dev.jsonl"])
def test_a_task_comes_from_the_hub(hub, source):
    assert len(load_qasper(source, 8)) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("who/two", "2 .jsonl files (a.jsonl, b.jsonl). Name one: who/two/a.jsonl"),
        ("who/none", "the repository has no .jsonl file"),
        ("who/one/x.jsonl", "cannot be had from the hub (No x.jsonl.)"),
        ("who/unknown", "cannot be had from the hub ('who/unknown')"),
        ("nothing.jsonl", "no such file, and no hub id"),
        ("data/nothing.jsonl", "no such file, and no hub id"),
        ("/tmp", "no such file, and no hub id"),
    ],
)
def test_what_is_no_file_and_not_on_the_hub_is_refused(hub, source, message):
    with pytest.raises(EvaluationError) as refused:
        load_qasper(source, 8)
    assert message in refused.value.line
    assert refused.value.line.startswith(f"Error: --qasper {source}")


def test_stories_start_from_passages_that_do_not_overlap():
    text = "\n\n".join(f"Word{i} is here." for i in range(90))
    examples = load_story(text, 3, 30, Words())
    words = [set(e.document.split()) - {"is", "here."} for e in examples]
    assert [e.source for e in examples] == [0, 1, 2]
    assert [len(w) for w in words] == [10, 10, 10]
    assert len(set.union(*words)) == 30
    assert all(e.document.startswith("Word") for e in examples)
    with pytest.raises(EvaluationError, match=r"part 1 of 3 has 9. tokens, .* 200"):
        load_story(text, 3, 200, Words())


@pytest.mark.skipif(not DATA.is_dir(), reason="the question sets are not here")
def test_the_question_sets_have_their_numbers_of_questions():
    examples = load_squality(str(DATA / "squality_dev.jsonl"), 999)
    assert len(examples) == 125
    assert {len(e.references) for e in examples} == {4}
    examples = load_qasper(str(DATA / "qasper_leval.jsonl"), 999)
    # 23 papers and 184 questions, less 3 papers for other judges and 9 second answers.
    assert (len(examples), len({e.source for e in examples})) == (151, 20)
    assert len({(e.document, e.question) for e in examples}) == 151
    assert sum(len(e.references) for e in examples) == 160


# Prompts


@pytest.mark.parametrize("task", ["squality", "qasper"])
def test_the_question_comes_after_the_document(task):
    words = Words()
    example = Example(0, "A fox ate.", "Who was it?", ())
    prompt = Prompts(words, "m", None).make(task, example, 8)
    said = words.decode(prompt.tokens)
    assert said.index("A fox ate.") < said.index("Who was it? <assistant>")
    assert prompt.cut_tokens == 0


@pytest.mark.parametrize("spare", [0, 1, 40, 197])
def test_a_long_document_loses_its_middle_and_fits(spare):
    document = " ".join(f"w{i}" for i in range(200))
    example = Example(0, document, "Who?", ())
    words = Words()
    whole = len(Prompts(words, "m", None).make("qasper", example, 8).tokens)
    prompt = Prompts(words, "m", whole + 8 - spare).make("qasper", example, 8)
    assert len(prompt.tokens) == whole - spare
    kept = [w for w in words.decode(prompt.tokens).split() if w[1:].isdigit()]
    # The mark of the gap takes one.
    assert prompt.cut_tokens == (spare + 1 if spare else 0) == 200 - len(kept)
    half = len(kept) // 2
    assert kept[:half] == [f"w{i}" for i in range(half)]
    assert kept[half:] == [f"w{i}" for i in range(200 - len(kept) + half, 200)]


def test_no_room_for_a_document_is_an_error():
    example = Example(0, "one two three four five", "Who?", ())
    with pytest.raises(EvaluationError, match="--max-tokens 90 and the question leave"):
        Prompts(Words(), "m", 100).make("squality", example, 90)


def test_a_model_without_a_chat_template_is_refused():
    with pytest.raises(EvaluationError, match="Base has no chat template"):
        Prompts(SimpleNamespace(has_chat_template=False), "Base", None)


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        ({"n_positions": 1024, "text_config": None}, 1024),
        ({"vocab_size": 9}, None),
    ],
)
def test_the_trained_context_is_that_of_the_config(tmp_path, config, context):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert trained_context(str(tmp_path)) == context


# Scores


def test_rouge_l_by_hand():
    # 2 of 3 words and 2 of 4 in order: F = 2 * 2 / 7; the stem of "sits" is "sit".
    assert rouge_l("a dog sits", ["dogs will sit down"]) == pytest.approx(4 / 7)
    # Not in order: one word.
    assert rouge_l("sit dog", ["dog sit"]) == pytest.approx(1 / 2)
    assert rouge_l("a dog sits", ["no", "dogs will sit down"]) == pytest.approx(4 / 7)
    assert rouge_l("", ["a dog"]) == 0


def test_f1_by_hand():
    # {cat, sat, down} and {cat, sat}: 2 in common, F = 2 * 2 / 5.
    assert f1("The cat sat down!", ["a cat, sat"]) == pytest.approx(4 / 5)
    # Words count as often as they are there.
    assert f1("no no no", ["no"]) == pytest.approx(2 / 4)
    assert f1("a dog", ["cat", "Dog."]) == 1
    assert f1("", ["cat"]) == f1("the", ["cat"]) == f1("dog", [""]) == 0
    assert f1("The", ["a."]) == 1


def test_repetition_by_hand():
    # Runs of four: abcd bcda cdab dabc abcd; one was there before.
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition("a b c d e f") == 0
    assert repetition("a b c") == repetition("") == 0


def test_questions_of_one_document_count_together():
    values = [0.1, 0.4, 0.3, 0.8]
    mean, error = mean_over(values, range(4))
    assert mean == pytest.approx(0.4)
    assert error == pytest.approx(np.std(values, ddof=1) / 2)
    # Deviations -0.3 and 0.3 of two documents: sqrt(2 * (0.09 + 0.09)) / 4.
    assert mean_over(values, "aabb")[1] == pytest.approx(0.15)
    assert mean_over(values, "aaaa") == (pytest.approx(0.4), None)


# Rows


WANTED = settings(("tova", "streaming"), (8, 16))


def task(name="qasper", n=3, max_tokens=4, **drawn):
    examples = [Example(i, "doc", f"q{i}?", (f"answer {i}",)) for i in range(n)]
    prompts = [Prompt([i, 7, n], 2 * i) for i in range(n)]
    return Task(name, "x.jsonl", examples, prompts, max_tokens, **drawn)


def saying(model, tokenizer, prompt, cache, step, max_tokens):
    """Right under full, on the first example, and with recall on the second."""
    (setting,) = cache
    right = setting.policy == "full" or prompt[0] <= bool(setting.recall)
    return f"answer {prompt[0]}" if right else "nothing"


@pytest.fixture
def asked(monkeypatch):
    """Settings and examples that a model without weights was asked for, in order."""
    calls = []

    def answer(*arguments):
        calls.append((str(*arguments[3]), arguments[2][0]))
        return saying(*arguments)

    def told(*arguments, temp, seed):
        (setting,) = arguments[3]
        calls.append((str(setting), arguments[2][0]))
        size = (setting.max_kv_size or 0) - (setting.recall or 0)
        return "a b c d a b c d", [size, seed]

    monkeypatch.setattr(
        longrange, "filled", lambda model, ids, setting, step: [setting]
    )
    monkeypatch.setattr(longrange, "answer", answer)
    monkeypatch.setattr(longrange, "tell", told)
    monkeypatch.setattr(
        longrange, "loss_under_full", lambda m, prompt, story, step: sum(story) / 100
    )
    return calls


def measured(directory):
    common = {"model": "m", "dtype": "float32", "seed": 0, "date": "2020-01-01"}
    results = Results(directory, common, ("model", "dtype"))
    same = {"model": "m", "dtype": "float32"}
    return LongRange(None, None, results, Answers(directory, same), 256)


def test_a_row_is_the_mean_of_its_answers(tmp_path, asked):
    full, tova = measured(tmp_path).run([task()], WANTED[:2])
    assert (full["unit"], full["value"], full["stderr"], full["n"]) == ("f1", 1, 0, 3)
    assert (full["tokens"], full["cut_tokens"]) == (3, 2)
    assert "minus_full" not in full
    assert (tova["task"], tova["policy"], tova["max_kv_size"]) == ("qasper", "tova", 8)
    assert tova["value"] == pytest.approx(1 / 3)
    assert tova["minus_full"] == pytest.approx(-2 / 3)
    assert tova["minus_full_stderr"] == pytest.approx(1 / 3)
    answers = written(tmp_path / "answers.jsonl")
    assert [a["answer"] for a in answers[3:]] == ["answer 0", "nothing", "nothing"]
    assert answers[1]["references"] == ["answer 1"]
    assert answers[4]["score"] == 0


def test_a_story_is_scored_by_perplexity_and_repetition(tmp_path, asked):
    stories = task("story", n=2, temp=0.5, seed=3)
    full, tova = measured(tmp_path).run([stories], WANTED[:2])
    # Losses .03 and .04, then .11 and .12: seeds are 3 and 4 for both.
    assert full["unit"] == "perplexity"
    assert full["value"] == pytest.approx(math.exp(0.035))
    assert full["stderr"] == pytest.approx(math.exp(0.035) * 0.005)
    assert tova["value"] == pytest.approx(math.exp(0.115))
    assert tova["ratio_to_full"] == pytest.approx(math.exp(0.08))
    assert tova["ratio_to_full_stderr"] == pytest.approx(0, abs=1e-9)
    assert (tova["repetition"], tova["temp"]) == (pytest.approx(0.2), 0.5)


RECALLING = settings(("tova",), (32,), recall=(16,))


def test_what_recalls_is_compared_with_the_same_without(tmp_path, asked):
    questions, stories = task(), task("story", n=2, seed=3)
    rows = list(measured(tmp_path).run([questions, stories], RECALLING))
    assert [row.get("recall") for row in rows] == 2 * [None, None, 16]
    full, without, recalled = rows[:3]
    assert not {"minus_no_recall", "recall"} & {*full, *without}
    # Of three questions it answers one more, one less than full.
    assert recalled["value"] == pytest.approx(2 / 3)
    assert recalled["minus_full"] == pytest.approx(-1 / 3)
    assert recalled["minus_no_recall"] == pytest.approx(1 / 3)
    assert recalled["minus_no_recall_stderr"] == pytest.approx(1 / 3)
    # Losses are (32 + 3.5) / 100 without, (16 + 3.5) / 100 with, 0.035 under full.
    recalled = rows[5]
    assert recalled["ratio_to_full"] == pytest.approx(math.exp(0.16))
    assert recalled["ratio_to_no_recall"] == pytest.approx(math.exp(-0.16))
    assert recalled["ratio_to_no_recall_stderr"] == pytest.approx(0, abs=1e-9)


def test_what_recalls_is_measured_beside_older_rows(tmp_path, asked):
    older = list(measured(tmp_path).run([task()], RECALLING[:2]))
    asked.clear()
    run = measured(tmp_path)
    assert run.cost([task()], RECALLING) == 3 * (3 + 4)
    rows = list(run.run([task()], RECALLING))
    assert rows[:2] == older
    assert asked == [("tova 32 recall 16", i) for i in range(3)]
    # Without the older answers a new row has nothing to be paired with.
    (tmp_path / "answers.jsonl").unlink()
    path = tmp_path / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    asked.clear()
    assert list(measured(tmp_path).run([task()], RECALLING)) == rows
    assert asked == [(str(s), i) for s in RECALLING for i in range(3)]


@pytest.mark.parametrize("killed_at", [0, 1, 3, 4, 14, 20])
def test_a_killed_run_goes_on_with_the_next_example(
    tmp_path, asked, monkeypatch, killed_at
):
    tasks = [task(), task("story", n=2)]
    want = list(measured(tmp_path / "whole").run(tasks, WANTED))
    everything = list(asked)
    assert len(everything) == 5 * (3 + 2)
    asked.clear()

    def killed(*_, **__):
        if len(asked) == killed_at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for name in ("answer", "tell"):
            ask = getattr(longrange, name)
            patch.setattr(
                longrange, name, lambda *a, ask=ask, **k: killed() or ask(*a, **k)
            )
        with pytest.raises(KeyboardInterrupt):
            list(measured(tmp_path / "killed").run(tasks, WANTED))
    got = list(measured(tmp_path / "killed").run(tasks, WANTED))
    assert got == want
    assert asked == everything
    for name in ("results.jsonl", "answers.jsonl"):
        files = [tmp_path / d / name for d in ("whole", "killed")]
        assert files[0].read_text() == files[1].read_text()


def test_half_a_line_is_written_again(tmp_path, asked):
    want = list(measured(tmp_path).run([task()], WANTED))
    texts = {}
    for name in ("results.jsonl", "answers.jsonl"):
        texts[name] = (tmp_path / name).read_text()
        (tmp_path / name).write_text(texts[name][:-20])
    asked.clear()
    assert list(measured(tmp_path).run([task()], WANTED)) == want
    assert asked == [("streaming 16", 2)]
    assert {n: (tmp_path / n).read_text() for n in texts} == texts


def test_what_is_there_is_not_asked_again_and_what_differs_is(tmp_path, asked):
    list(measured(tmp_path).run([task()], WANTED))
    asked.clear()
    run = measured(tmp_path)
    assert run.cost([task()], WANTED) == 0
    assert len(list(run.run([task()], WANTED))) == 5
    assert asked == []
    assert run.cost([task(max_tokens=5)], WANTED[:2]) == 2 * 3 * (3 + 5)
    rows = list(run.run([task(max_tokens=5)], WANTED))
    assert len(asked) == 15
    assert {row["max_tokens"] for row in rows} == {5}
    stories = [task("story", seed=s) for s in (0, 1)]
    assert stories[0].digest != stories[1].digest


def test_more_examples_keep_the_answers_that_are_there(tmp_path, asked):
    two = Task("qasper", "x", task().examples[:2], task().prompts[:2], 4)
    list(measured(tmp_path).run([two], WANTED[:1]))
    asked.clear()
    (row,) = measured(tmp_path).run([task()], WANTED[:1])
    assert asked == [("full", 2)]
    assert row["n"] == 3


def test_full_is_asked_again_only_for_a_new_row(tmp_path, asked):
    want = list(measured(tmp_path).run([task()], WANTED))
    (tmp_path / "answers.jsonl").unlink()
    asked.clear()
    assert list(measured(tmp_path).run([task()], WANTED)) == want
    assert asked == []
    path = tmp_path / "results.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    run = measured(tmp_path)
    assert run.cost([task()], WANTED) == 2 * 3 * (3 + 4)
    assert list(run.run([task()], WANTED)) == want
    assert asked == [(s, i) for s in ("full", "streaming 16") for i in range(3)]


def test_questions_on_one_document_read_it_once(tmp_path, monkeypatch):
    # Rows of 64 numbers, or there would be no archive for recall.
    model, rows = tiny.make(head_dim=64), tiny.tokens(300)[0].tolist()
    tails = [[1, 2, 3], [1, 9], [4], [5, 6]]
    examples = [Example(i % 2, "doc", "?", ("x",)) for i in range(4)]
    examples.append(Example(2, "doc", "?", ("x",)))
    prompts = [
        rows[50 * e.source :][:90] + t for e, t in zip(examples[:4], tails, strict=True)
    ]
    prompts.append(rows[:70])
    papers = Task("qasper", "x", examples, [Prompt(p, 0) for p in prompts], 8)
    assert papers.shared == [90, 90, 90, 90, 0]
    asked = []

    def spelled(model, tokenizer, prompt, cache, step, max_tokens):
        """The tokens that follow, as text; `answer` needs a tokenizer for it."""
        asked.append(len(prompt))
        steps = generate_step(
            mx.array(prompt), model, max_tokens=max_tokens, prompt_cache=cache
        )
        return " ".join(str(token) for token, _ in steps)

    monkeypatch.setattr(longrange, "answer", spelled)
    read = []
    monkeypatch.setattr(
        longrange,
        "filled",
        lambda model, ids, *how: (
            read.append(len(ids)) or reading.filled(model, ids, *how)
        ),
    )
    common = {"model": "m", "dtype": "float32"}
    for setting in settings(("tova", "h2o"), (32,), recall=(16,)):
        results = Results(tmp_path / str(setting), common, tuple(common))
        answers = Answers(results.directory, common)
        run = LongRange(model, None, results, answers, 32)
        asked.clear(), read.clear()
        list(run.run([papers], [setting]))
        assert read == [90, 90, 0]
        assert asked == [3, 1, 2, 2, 70]
        known = [answers.get("qasper", d, setting) for d in papers.digests]
        got = [answer["answer"] for answer in known]
        for said, prompt in zip(got, prompts, strict=True):
            cache = new_cache(model, setting)
            assert said == spelled(model, None, prompt, cache, 32, 8)


@pytest.mark.parametrize("content", ["[1]\n", "{}\n", "nothing\n"])
def test_a_file_of_something_else_is_left_alone(tmp_path, content):
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(EvaluationError, match="that is no answer"):
        measured(tmp_path)
    assert (tmp_path / "answers.jsonl").read_text() == content


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, still open."""
    drawn = []
    keep = longrange.save
    monkeypatch.setattr(longrange, "save", lambda f, p: drawn.append(f) or keep(f, p))
    return drawn


@pytest.mark.parametrize("sizes", [(8,), (8, 16, 64)])
def test_the_figure_has_a_panel_per_task(tmp_path, asked, figures, sizes):
    wanted = settings(("tova", "fade"), sizes)
    tasks = [task("squality"), task(), task("story", n=2)]
    rows = list(measured(tmp_path).run(tasks, wanted))
    plot(rows, tmp_path / "x.png")
    panels = figures[0].axes
    assert len(panels) == 3
    for axes, kind in zip(panels, ("SQuALITY", "QASPER", "Stories"), strict=True):
        assert kind in axes.get_title()
        assert axes.get_ylabel()
        assert "max_kv_size" in axes.get_xlabel()
        assert [t.get_text() for t in axes.get_xticklabels()] == [*map(str, sizes)]
        # A line per policy, with a bar at each size, and full dashed.
        assert len(axes.containers) == 2
        assert all(len(c.lines[0].get_xdata()) == len(sizes) for c in axes.containers)
        assert [line.get_linestyle() for line in axes.lines].count("--") == 1
    words = {t.get_text() for t in figures[0].legends[0].get_texts()}
    assert words == {"full", "tova", "fade"}
    from matplotlib.image import imread

    pixels = imread(tmp_path / "x.png")[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_the_figure_tells_what_recalls_from_what_does_not(tmp_path, asked, figures):
    wanted = settings(("tova", "fade"), (32, 64), recall=(16,))
    plot(list(measured(tmp_path).run([task()], wanted)), tmp_path / "x.png")
    (axes,) = figures[0].axes
    looks = {}
    for line in axes.containers:
        mark = line.lines[0]
        assert len(mark.get_xdata()) == 2
        looks[line.get_label()] = mark.get_markerfacecolor(), mark.get_linestyle()
    assert set(looks) == {"tova", "fade", "tova recall 16", "fade recall 16"}
    for policy in ("tova", "fade"):
        plain, recalled = looks[policy], looks[f"{policy} recall 16"]
        assert plain[0] != "none" == recalled[0]
        assert plain[1] != recalled[1]


def test_the_table_tells_what_recalls_from_what_does_not(tmp_path, asked):
    rows = list(measured(tmp_path).run([task(), task("story", n=2)], RECALLING))
    heads, *said = [re.split(r"  +", line) for line in _table(rows).splitlines()]
    assert heads[2:7] == ["policy", "size", "value", "to full", "to no recall"]
    assert [line[2] for line in said] == 2 * ["full", "tova", "tova recall 16"]
    assert said[2][5:] == ["-0.333 ± 0.333", "+0.333 ± 0.333"]
    assert said[5][5:] == ["+17.4 ± 0.0 %", "-14.8 ± 0.0 %", "20.0%"]
    # Where nothing recalls there is nothing to compare with.
    assert "recall" not in _table(rows[:2])


# Stories with a real model


@pytest.mark.real_model
def test_a_story_has_its_length_and_never_ends_before(demo):
    model, tokenizer = demo
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? One word."}],
        add_generation_prompt=True,
    )

    def ask():
        cache = new_cache(model, Setting("tova", 64))
        return model, tokenizer, prompt, cache, 256, 16

    # Left to itself, it ends after 7 tokens.
    assert answer(*ask()) == "The capital of France is Paris."
    said, tokens = tell(*ask(), temp=0.0, seed=5)
    assert len(tokens) == 16
    assert not set(tokens) & set(tokenizer.eos_token_ids)
    assert said.startswith("The capital of France is Paris.")


@pytest.mark.real_model
def test_a_story_is_drawn_by_its_seed(demo):
    model, tokenizer = demo
    prompt = tokenizer.encode("It was a dark night, and")

    def drawn(seed):
        cache = new_cache(model, Setting("tova", 8))
        return tell(model, tokenizer, prompt, cache, 256, 8, temp=1.0, seed=seed)

    assert drawn(5) == drawn(5)
    assert drawn(6) != drawn(5)


@pytest.mark.real_model
def test_a_story_is_scored_by_the_unbounded_model(demo):
    model, tokenizer = demo
    ids = tokenizer.encode("It was a dark night, and the ship went down with all.")
    prompt, story = ids[:8], ids[8:]
    logits = model(mx.array([ids]), cache=make_prompt_cache(model))
    losses = nn.losses.cross_entropy(logits[0, 7:-1], mx.array(story))
    got = loss_under_full(model, prompt, story, step=5)
    assert got == pytest.approx(losses.mean().item(), rel=1e-4)


# The command


def run(*arguments):
    return CliRunner().invoke(main, ["eval", "longrange", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give --squality, --qasper or --text"),
        (("--task", "story"), "--task story needs --text"),
        (("--task", "story", "--text", __file__, "--qasper", "y"), "no --task qasper"),
        (("--task", "poem"), "'poem' is not one of"),
        (("--examples", "0"), "0 is not in the range"),
    ],
)
def test_tasks_and_data_must_agree(tmp_path, arguments, message):
    result = run("--out", tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--qasper", "{}/nothing.jsonl"), "no such file"),
        (("--squality", "{}/papers.jsonl"), "line 1: no field 'document'"),
    ],
)
def test_bad_input_is_one_line_before_a_model_is_loaded(tmp_path, arguments, message):
    lines(tmp_path / "papers.jsonl", *PAPERS)
    arguments = [a.format(tmp_path) for a in arguments]
    result = run("--out", tmp_path / "out", "--model", "/", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_help_shows_the_defaults_without_importing_mlx():
    code = (
        "import sys; from tova_mlx.cli import main\n"
        "try: main(['eval', 'longrange', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'mlx', 'mlx_lm', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "Example: tova-mlx eval longrange" in done.stdout
    assert done.stdout.count("[default:") >= 7


@pytest.mark.real_model
def test_a_tiny_slice_of_each_task(demo_path, tmp_path, text):
    (tmp_path / "whale.txt").write_text(text, encoding="utf-8")
    stories = lines(
        tmp_path / "s.jsonl",
        story(text[:800], ("Who speaks?", "Ishmael speaks.", "A sailor.")),
        story(text[3000:3800], ("What is it about?", "The sea.", "Ships.")),
    )
    papers = lines(tmp_path / "q.jsonl", paper(text[:600], ("Who?", "Ishmael")))
    out = tmp_path / "out"
    arguments = (
        *("--model", demo_path, "--out", out, "--examples", 2, "--max-tokens", 6),
        *("--squality", stories, "--qasper", papers, "--text", tmp_path / "whale.txt"),
        *("--story-tokens", 100, "--policy", "tova", "--max-kv-size", 32),
    )
    result = run(*arguments)
    assert result.exit_code == 0, (result.stderr, result.exception)
    rows = written(out / "results.jsonl")
    assert [(r["task"], r["policy"], r["unit"], r["n"]) for r in rows] == [
        ("squality", "full", "rouge_l", 2),
        ("squality", "tova", "rouge_l", 2),
        ("qasper", "full", "f1", 1),
        ("qasper", "tova", "f1", 1),
        ("story", "full", "perplexity", 2),
        ("story", "tova", "perplexity", 2),
    ]
    for row in rows:
        assert row["tokens"] > 100
        assert {"value", "stderr", "dtype", "seed", "versions", "device", "command"} < {
            *row
        }
    assert (out / "longrange.png").stat().st_size > 10_000
    answers = written(out / "answers.jsonl")
    assert len(answers) == 10
    assert all(a["answer"].strip() for a in answers)
    # What was dropped matters.
    assert answers[6]["answer"] != answers[8]["answer"]
    assert len(result.stdout.splitlines()) == 7
    assert "32" in result.stdout
    again = run(*arguments, "--json")
    assert json.loads(again.stdout)["rows"] == rows
    assert len((out / "answers.jsonl").read_text().splitlines()) == 10


@pytest.mark.real_model
def test_a_document_past_the_context_is_cut_and_said(
    demo_path, tmp_path, text, monkeypatch
):
    monkeypatch.setattr("tova_mlx.evaluation.prompts.trained_context", lambda _: 200)
    papers = lines(tmp_path / "q.jsonl", paper(text[:2000], ("Who?", "Ishmael")))
    result = run(
        *("--model", demo_path, "--out", tmp_path / "out", "--qasper", papers),
        *("--policy", "full", "--max-tokens", 8, "--json"),
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    (row,) = json.loads(result.stdout)["rows"]
    assert row["tokens"] <= 192
    assert row["cut_tokens"] > 200
    assert "qasper: 1 of 1 documents do not fit the 200 tokens" in result.stderr
