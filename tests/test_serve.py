"""The server as a user would use it: a process, and the openai client."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import openai
import pytest
from mlx_lm import generate

from tova_mlx import make_prompt_cache
from tova_mlx.models.conversion import pin_tokens

LIMIT = 128
pytestmark = pytest.mark.real_model


@contextmanager
def serving(*arguments, code="from tova_mlx.cli import main; main()"):
    """A server process on a free port, and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", code, "serve", "--port", str(port)]
    process = subprocess.Popen(
        [*command, *arguments], stderr=subprocess.PIPE, text=True
    )
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0
    )
    try:
        for _ in range(600):
            assert process.poll() is None, process.stderr.read()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield process, client
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(demo_path):
    arguments = ("--model", str(demo_path), "--max-kv-size", str(LIMIT))
    with serving(*arguments, "--log-level", "ERROR") as running:
        yield running


@pytest.fixture
def client(server):
    return server[1]


def user(text):
    return {"role": "user", "content": text}


def chat(client, messages, **options):
    options = {"model": "default_model", "max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(messages=messages, **options)


def answer(client, question):
    return chat(client, [user(question)]).choices[0].message.content


QUESTION = "Name three rivers of Europe and say where each of them ends. " * 12


def answer_alone(model, tokenizer, prompt_for):
    """The library's answer; prompt_for: the tokens for a text as the question."""
    caches = make_prompt_cache(model, LIMIT, positions="auto")
    # What the template puts before a question is as long as it is up to there.
    one, other = prompt_for("a"), prompt_for("b")
    begins = [a == b for a, b in zip(one, other, strict=True)].index(False)
    assert pin_tokens(caches, begins) == min(begins, LIMIT // 2)
    prompt = prompt_for(QUESTION)
    return generate(model, tokenizer, prompt, max_tokens=12, prompt_cache=caches)


SYSTEMS = [
    "You answer in French.",
    "You are a captain of a whaler, old and gruff, and answer with a curse or two.",
    "You are a poet. " * 20,
]


def test_each_conversation_pins_its_own_system_prompt(client, demo):
    model, tokenizer = demo

    def told(system, text):
        return [{"role": "system", "content": system}, user(text)]

    def want(system):
        def prompt_for(text):
            messages = told(system, text)
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True)

        return answer_alone(model, tokenizer, prompt_for)

    def ask(system):
        return chat(client, told(system, QUESTION)).choices[0].message.content

    alone = [want(system) for system in SYSTEMS]
    assert len(set(alone)) == len(SYSTEMS)
    # One after the other, then in one batch.
    assert [ask(system) for system in SYSTEMS] == alone
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, SYSTEMS * 2)) == alone * 2


def test_an_answer_is_that_of_the_library(client, demo):
    model, tokenizer = demo
    got = chat(client, [user(QUESTION)])
    assert got.usage.prompt_tokens > LIMIT
    assert got.usage.completion_tokens == 12

    def prompt_for(text):
        return tokenizer.apply_chat_template([user(text)], add_generation_prompt=True)

    want = answer_alone(model, tokenizer, prompt_for)
    assert got.choices[0].message.content == want


def test_a_stream_has_the_same_text(client):
    chunks = list(chat(client, [user(QUESTION)], stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert len(chunks) > 6
    assert text == answer(client, QUESTION)


def test_a_text_is_completed(client):
    got = client.completions.create(
        model="default_model", prompt="Call me", max_tokens=5, temperature=0
    )
    assert got.choices[0].text.strip()
    assert got.choices[0].finish_reason == "length"


def test_two_clients_at_once_get_their_own_answers(client):
    questions = [QUESTION, "What is seven times eight?"]
    alone = [answer(client, q) for q in questions]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda q: answer(client, q), questions * 2))
    assert together == alone * 2


def test_a_conversation_goes_on_from_what_is_cached(client):
    messages = [user("What is the capital of France? Answer in one word. " * 12)]
    first = chat(client, messages, max_tokens=60)
    assert first.usage.prompt_tokens > LIMIT
    said = first.choices[0]
    assert said.finish_reason == "stop"
    messages += [{"role": "assistant", "content": said.message.content}, user("Why?")]
    second = chat(client, messages)
    cached = second.usage.prompt_tokens_details.cached_tokens
    # All but the new question; nothing could be taken back after evictions.
    assert first.usage.prompt_tokens < cached < second.usage.prompt_tokens
    assert second.choices[0].message.content


TURNS = [
    "Name three rivers of Europe and say where each of them ends. " * 6,
    "Which one is the longest?",
    "And of Asia?",
    "Tell me a story about one of them.",
    "What is seven times eight?",
    "Why is the sky blue?",
    "Say that in one sentence.",
    "Who wrote Moby Dick?",
    "Give me a rhyme about a whale.",
    "What did I ask first?",
]


def conversation(client, drafts):
    """Answers to all turns, drafted as many tokens at a time as `drafts` says."""
    messages, texts = [], []
    for i, question in enumerate(TURNS):
        messages.append(user(question))
        body = {"num_draft_tokens": drafts[i % len(drafts)]}
        said = chat(client, messages, extra_body=body)
        texts.append(said.choices[0].message.content)
        messages.append({"role": "assistant", "content": texts[-1]})
    assert said.usage.prompt_tokens > 2 * LIMIT
    # The one before was answered with drafts, so nothing was read twice.
    cached = said.usage.prompt_tokens_details.cached_tokens
    assert said.usage.prompt_tokens - cached < 30
    return texts


def test_ten_turns_with_a_draft_model_are_those_without(client, demo_path):
    model = str(demo_path)
    arguments = ("--model", model, "--draft-model", model, "--num-draft-tokens", "20")
    limit = ("--max-kv-size", str(LIMIT), "--log-level", "ERROR")
    with serving(*arguments, *limit) as (_, drafted):
        # 20 is more than the caches can take back unless told; 0 leaves the draft
        # model's caches behind.
        texts = conversation(drafted, [3, 20, 0, 2, 1])
        with pytest.raises(openai.BadRequestError) as refusal:
            chat(drafted, [user("Why?")], extra_body={"num_draft_tokens": 21})
        assert "must be at most 20" in refusal.value.response.json()["error"]
        assert answer(drafted, "Why?")
    assert texts == conversation(client, [0])


def test_fifty_clients_at_the_same_moment_are_all_served(small_path):
    arguments = ("--model", str(small_path), "--log-level", "ERROR")
    body = json.dumps({"prompt": "Call me", "max_tokens": 1}).encode()
    head = f"POST /v1/completions HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n"
    with serving(*arguments) as (process, client):
        # Stopped, it can take none of them from the queue.
        process.send_signal(signal.SIGSTOP)
        address = ("127.0.0.1", client.base_url.port)
        try:
            clients = [socket.create_connection(address, 2) for _ in range(50)]
        finally:
            process.send_signal(signal.SIGCONT)
        for each in clients:
            each.settimeout(60)
            each.sendall(head.encode() + body)
        for each in clients:
            with each, each.makefile("rb") as answered:
                assert b" 200 " in answered.readline()


def test_a_client_that_leaves_does_not_stop_the_server(client):
    stream = chat(client, [user("Count to a thousand.")], stream=True, max_tokens=2000)
    next(iter(stream))
    stream.close()
    assert answer(client, "What is seven times eight?")


def test_models_are_listed_and_an_unknown_one_is_refused(client, demo_path):
    assert str(demo_path) in [m.id for m in client.models.list()]
    with pytest.raises(openai.NotFoundError) as refused:
        chat(client, [user("Why?")], model="./nothing")
    assert "no such directory" in refused.value.response.json()["error"]
    assert answer(client, "What is seven times eight?")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_when_told_to(demo_path, number):
    with serving("--model", str(demo_path)) as (process, client):
        assert answer(client, "Why?")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "tova keeps 1024 tokens per layer" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--kv-bits", "3"), 2, "use 4, 5, 6, 8, or a pair"),
        (("--port", "{taken}"), 1, "cannot listen"),
        (("--port", "99999"), 2, "99999 is not in the range"),
        (("--port", "-1"), 2, "-1 is not in the range"),
        (("--port", "http"), 2, "'http' is not a valid integer"),
        (("--host", ".."), 1, "cannot listen"),
        (("--num-draft-tokens", "-1"), 2, "-1 is not in the range"),
        (("--model", "./nothing"), 1, "no such directory"),
        (("--draft-model", "./nothing"), 1, "no such directory"),
        (("--policy", "window", "--memory", "0.5"), 2, "does not read --memory 0.5"),
        (("--no-such-option",), 2, "unrecognized arguments"),
    ],
)
def test_what_cannot_be_served_ends_with_the_reason(
    demo_path, arguments, code, message
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = refused([a.replace("{taken}", port) for a in arguments])
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    # What the options alone can tell is told before a model is loaded.
    assert code == 1 or "tova keeps" not in done.stderr


def refused(arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "tova_mlx", "serve", "--port", "0", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
    )


def test_a_hub_cache_that_cannot_be_made_is_one_line(demo_path, tmp_path):
    (tmp_path / "file").touch()
    place = str(tmp_path / "file" / "hub")
    done = refused(["--model", str(demo_path)], HF_HUB_CACHE=place)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: HF_HUB_CACHE={place}: cannot be made")
    assert done.stderr.count("\n") == 1


def test_memory_stays_bounded_over_growing_requests(small_path):
    resident = []
    # Small steps, or what is passing grows with the prompts up to 2,048 tokens.
    arguments = ("--max-kv-size", "32", "--prefill-step-size", "128")
    arguments += ("--model", str(small_path), "--log-level", "ERROR")
    with serving(*arguments) as (process, client):
        for i in range(200):
            chat(client, [user("word " * 5 * (i + 1))], max_tokens=1)
            resident.append(resident_bytes(process.pid))
    # Ten unbounded caches of 1,000 tokens would be 320 MB here.
    assert median(resident[-20:]) - median(resident[40:60]) < 60e6


@pytest.mark.parametrize("bits", [(), ("--kv-bits", "4")])
def test_eight_clients_and_what_is_stored_stay_within_a_budget(small_path, bits):
    budget, most = 48e6, 0
    arguments = ("--max-kv-size", "48MB", "--prefill-step-size", "128", *bits)
    arguments += ("--model", str(small_path), "--log-level", "ERROR")
    talks = [[] for _ in range(8)]

    def turn(i):
        talks[i].append(user(f"word{i} " * (400 + 50 * len(talks[i]))))
        reply = chat(client, talks[i], max_tokens=4).choices[0].message
        talks[i].append({"role": "assistant", "content": reply.content})

    with serving(*arguments) as (process, client):
        chat(client, [user("word " * 800)], max_tokens=4)
        before = resident_bytes(process.pid)
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                list(pool.map(turn, range(8)))
                most = max(most, resident_bytes(process.pid))
    # A step of five rows takes its own; 24 turns of 1,024 tokens would be 800 MB here.
    assert most - before < budget + 60e6, (most - before) / 1e6


def test_a_budget_that_cannot_be_shared_is_a_usage_error(small_path):
    command = [sys.executable, "-m", "tova_mlx", "serve", "--model", str(small_path)]
    for size, said in (
        ("100kB", "is too small for each of 15 parts"),
        ("1XB", "is not"),
    ):
        done = subprocess.run(
            [*command, "--max-kv-size", size, "--port", "0"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 2, done.stderr
        assert said in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def resident_bytes(pid):
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        return int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1]) * 1024
    command = ["ps", "-o", "rss=", "-p", str(pid)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(found.stdout) * 1024
