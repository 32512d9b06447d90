"""Recall as its users have it: options, a chat in processes, a server, evaluations."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner
from mlx_lm import generate
from test_serve import serving

from tova_mlx import make_prompt_cache
from tova_mlx.cli import main
from tova_mlx.evaluation.reading import cache_options
from tova_mlx.evaluation.results import Setting, settings

PROGRAM = [sys.executable, "-m", "tova_mlx"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("chat --recall 8", "blocks of 16"),
        ("chat --recall -16", "not in the range"),
        ("chat --recall 1024", "leaves the policy none"),
        ("chat --policy full --recall 64", "evicts nothing"),
        ("chat --recall 64 --positions compact", "--positions original"),
        ("generate --recall 64 --prefill once x", "--prefill stepwise"),
        ("chat --archive /tmp/x", "nothing without --recall"),
        ("chat --recall 64 --archive-limit 1GB", "nothing without --archive"),
        ("chat --recall 64 --archive-full forget", "nothing without --archive"),
        ("chat --recall 64 --archive /tmp/x --archive-limit 3parsecs", "no size"),
        ("serve --recall 64 --archive /tmp/x", "of one conversation"),
        ("eval needle --text {} --out {}.d --recall 24", "blocks of 16"),
        ("eval perplexity {} --out {}.d --recall 512", "leaves the policy none"),
        ("eval longrange --text {} --out {}.d --recall 24", "blocks of 16"),
        ("eval longrange --text {} --out {}.d --recall 256", "leaves the policy none"),
    ],
)
def test_options_that_cannot_work_are_one_line(words, said, tmp_path):
    (tmp_path / "text").write_text("A text.")
    words = words.replace("{}", str(tmp_path / "text")).split()
    found = CliRunner().invoke(main, words)
    assert found.exit_code == 2
    assert said in re.sub(r"\s+", " ", found.output)
    assert "Traceback" not in found.output


def test_a_setting_is_measured_with_recall_and_without():
    found = settings(["tova", "full"], [256], recall=[64])
    assert found == [
        Setting("full", None),
        Setting("tova", 256),
        Setting("tova", 256, recall=64),
    ]
    assert Setting.of(found[2].to_row()) == found[2]
    assert Setting.of(found[1].to_row()) == found[1]
    assert str(found[2]) == "tova 256 recall 64"
    assert cache_options(found[2])["recall"] == 64
    assert "recall" not in cache_options(found[1])


def chat(lines, *options):
    done = subprocess.run(
        [*PROGRAM, "chat", *options],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.real_model
def test_a_chat_says_what_came_back_and_goes_on_where_it_was_saved(
    small_path, tmp_path
):
    questions = [
        f"{n} green bottles hanging on a wall, {n * 7} more." for n in range(9)
    ]
    how = ["--model", str(small_path), "--max-kv-size", "96", "--recall", "32"]
    how += ["--max-tokens", "16", "--policy", "fade"]
    disk = ["--archive", str(tmp_path / "archive")]
    whole, _ = chat(questions, *how)
    file = str(tmp_path / "talk")
    first, said = chat(
        [*questions[:6], "/stats", "/recalled", f"/save {file}"], *how, *disk
    )
    assert re.search(r"recall: \d+ evicted tokens a layer .* shows the \d+ ", said)
    assert re.search(r"^ +\d+ +\d layers?  .*(bottles|wall|more|green)", said, re.M)
    assert "archive bytes" in said
    assert not (tmp_path / "archive" / "caches-000").exists()
    second, said = chat([f"/load {file}", "/stats", *questions[6:]], *how, *disk)
    assert "archive bytes" in said
    assert first + second == whole
    third, _ = chat([f"/load {file}", *questions[6:]], *how)
    assert first + third == whole


@pytest.mark.real_model
def test_a_server_recalls_for_each_conversation(demo_path, demo, text):
    model, tokenizer = demo
    words = text.split()
    prompts = [" ".join(words[i : i + 180]) for i in (0, 400)]
    how = {"policy": "fade", "recall": 32, "journal": 16}
    want = []
    for prompt in prompts:
        messages = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        caches = make_prompt_cache(model, 128, **how)
        want.append((tokens, caches))
    arguments = ("--model", str(demo_path), "--max-kv-size", "128", "--recall", "32")
    others = ("--policy", "fade", "--no-pin-system", "--log-level", "ERROR")
    with serving(*arguments, *others) as (_, client), ThreadPoolExecutor(2) as pool:

        def ask(prompt):
            answer = client.chat.completions.create(
                model="default_model",
                messages=[{"role": "user", "content": prompt}],
                max_tokens=24,
                temperature=0,
            )
            return answer.choices[0].message.content

        got = list(pool.map(ask, prompts))
        again = ask(prompts[0])
    for (tokens, caches), answer in zip(want, got, strict=True):
        alone = generate(model, tokenizer, tokens, max_tokens=24, prompt_cache=caches)
        assert answer == alone
    assert again == got[0]


@pytest.mark.real_model
def test_an_evaluation_has_both(small_path, text, tmp_path):
    (tmp_path / "text.txt").write_text(text)
    command = [*PROGRAM, "eval", "perplexity", str(tmp_path / "text.txt")]
    command += ["--model", str(small_path), "--tokens", "400", "--context", "400"]
    command += ["--policy", "fade", "--max-kv-size", "96", "--recall", "32"]
    command += ["--out", str(tmp_path / "out"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [r.get("recall") for r in rows] == [None, None, 32]
    assert rows[2]["ratio_to_no_recall"] != 1


@pytest.mark.real_model
def test_answers_to_questions_have_both(demo_path, text, tmp_path):
    paper = {
        "input": text[:1000],
        "instructions": ["Who?", "Where?"],
        "outputs": ["Ishmael", "At sea"],
    }
    (tmp_path / "papers.jsonl").write_text(json.dumps(paper) + "\n")
    command = ["eval", "longrange", "--qasper", str(tmp_path / "papers.jsonl")]
    command += ["--model", str(demo_path), "--max-tokens", "8", "--policy", "fade"]
    command += ["--max-kv-size", "96", "--recall", "32", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*command, "--json"])
    assert done.exit_code == 0, (done.stderr, done.exception)
    rows = json.loads(done.stdout)["rows"]
    assert [r.get("recall") for r in rows] == [None, None, 32]
    assert {"minus_full", "minus_no_recall", "minus_no_recall_stderr"} < {*rows[2]}
    lines = (tmp_path / "out" / "answers.jsonl").read_text("utf-8").splitlines()
    said = [a["answer"] for a in map(json.loads, lines)]
    # Two questions each; what came back matters.
    assert len(said) == 6
    assert said[2:4] != said[4:]
    assert (tmp_path / "out" / "longrange.png").stat().st_size > 10_000
