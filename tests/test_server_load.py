"""scripts/load_server.py in short, and a server that fails in the midst."""

import json
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from mlx_lm import load
from test_serve import chat, serving, user

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import abusers
import load_server
import server_abuse

pytestmark = pytest.mark.real_model
LIMIT = 40


@pytest.fixture(scope="module")
def stormed(small_path):
    model, tokenizer = load(str(small_path))[:2]
    asked = load_server.questions(12)
    for question in asked:
        load_server.answer_alone(model, tokenizer, question, LIMIT)
    arguments = ("--model", str(small_path), "--max-kv-size", str(LIMIT))
    return load_server.storm(arguments, asked, clients=6, context=100)


def test_a_storm_leaves_all_answers_right(stormed):
    assert load_server.wrong(stormed) == [], stormed
    assert stormed["answers_checked"] == 20
    assert stormed["equal"] + len(stormed["different"]) == 20
    assert stormed["abuse"].keys() > server_abuse.ABUSES.keys()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("unanswered", {"unanswered": 1}),
        ("foreign_text", {"foreign_text": 1}),
        ("different", {"different": [{"margin": 0.5}]}),
        ("wrong_statuses", {"wrong_statuses": {"a path": ["200"]}}),
        ("ended_by_itself", {"ended_by_itself": 1}),
        ("exit", {"exit": 1}),
        ("resident", {"resident_warm": 0, "resident_final": 1e9}),
        ("tracebacks", {"tracebacks": 1}),
    ],
)
def test_what_is_wrong_is_named(stormed, name, change):
    assert load_server.wrong(stormed | change) == [name]


def test_a_secret_of_another_client_is_seen():
    one, other = load_server.words(2)
    texts = [(one, f"It is {one}."), (one, "It is."), ("", "It is.")]
    assert load_server.foreign(texts, {one, other}) == 0
    texts += [(one, f"{other.title()} it is."), ("", f"{one}{other}")]
    assert load_server.foreign(texts, {one, other}) == 2


def test_a_status_that_is_not_right_is_found():
    got = {"a path": Counter({"404": 3}), "leaves": {"left": 1}}
    assert abusers.wrong_statuses(got) == {}
    got["a path"]["200"] += 1
    assert abusers.wrong_statuses(got) == {"a path": ["200"]}


def test_the_margin_is_that_of_the_token_where_two_texts_part():
    question = load_server.Question("", "", ["a", "ab", "abc"], [1.0, 2.0, 3.0])
    for text, margin in (("b", 1.0), ("ax", 2.0), ("ab", 3.0), ("abx", 3.0)):
        assert load_server.margin_where_they_part(question, text) == margin


# A server whose model fails when it reads a certain token in a prompt.
FAILING = """
import sys
from mlx_lm.models import llama
from tova_mlx.cli import main
theirs = llama.Model.__call__

def call(self, inputs, *args, **how):
    if inputs.shape[1] > 1 and (inputs == {token}).any().item():
        raise RuntimeError("planted")
    return theirs(self, inputs, *args, **how)

llama.Model.__call__ = call
main()
"""
# What failed may be another's: its text is for the log alone.
LOST = r"Generating failed \(RuntimeError\)\. Ask again\."
POISON = "volcano and fire"
AT_ONCE = 3


@pytest.fixture(scope="module")
def failing(small_path):
    tokenizer = load(str(small_path))[1]
    token = tokenizer.encode(POISON, add_special_tokens=False)[0]
    arguments = ("--model", str(small_path), "--log-level", "ERROR")
    arguments += ("--decode-concurrency", str(AT_ONCE), "--prompt-concurrency", "1")
    with serving(*arguments, code=FAILING.format(token=token)) as running:
        yield running


def test_a_failure_ends_the_answers_of_its_batch_and_nothing_else(failing):
    _, client = failing
    before = chat(client, [user("Why?")]).choices[0].message.content
    stream = chat(client, [user("Count!")], stream=True, max_tokens=100_000)
    next(iter(stream))
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(chat, client, [user("Count!")], max_tokens=100_000)
        for _ in range(3):
            next(iter(stream))
        with pytest.raises(openai.APIStatusError) as refused:
            client.completions.create(
                model="default_model", prompt=POISON, max_tokens=4
            )
        with pytest.raises(openai.APIError, match=LOST):
            for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError) as lost:
            whole.result(60)
    for error in (refused.value, lost.value):
        assert error.status_code == 500
        assert re.fullmatch(LOST, error.response.json()["error"])
    after = chat(client, [user("Why?")])
    assert after.choices[0].message.content == before
    # What was stored may be what failed.
    assert after.usage.prompt_tokens_details.cached_tokens == 0
    health = f"{str(client.base_url).removesuffix('/v1/')}/health"
    with urllib.request.urlopen(health) as answer:
        assert json.load(answer) == {"status": "ok"}


def test_a_server_that_cannot_generate_ends_with_a_word(small_path):
    code = """
from mlx_lm.server import ResponseGenerator
from tova_mlx.cli import main

def fail(self):
    raise RuntimeError("planted")

ResponseGenerator._generate = fail
main()
"""
    command = [sys.executable, "-c", code, "serve", "--model", str(small_path)]
    done = subprocess.run(
        [*command, "--port", "0"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: no answer can be generated (RuntimeError: planted)")
    assert "Traceback" not in done.stderr


def test_clients_that_have_left_do_not_keep_others_waiting(failing):
    _, client = failing
    endless = {"messages": [user("Count!")], "max_tokens": 10**9}
    # Long enough for the first ones to be in the midst of their answers.
    with ThreadPoolExecutor(2 * AT_ONCE) as pool:
        for _ in range(2 * AT_ONCE):
            pool.submit(abusers.leave, client.base_url.port, endless, 2.0)
    assert chat(client.with_options(timeout=60), [user("Why?")]).choices
