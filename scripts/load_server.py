"""A server with many clients at once, each answer checked, while others abuse it.

    python scripts/load_server.py [--clients 56] [--questions 1] [--settings tova draft]
        [--out results/trust/server.json]

Starts `tova-mlx serve` on the demo model, once for every setting. All clients ask at
once, greedily, streamed and not; each question has a secret word of its own. An answer
must be what the same model and policy answer alone, in this process. Where it is not,
the margin says by how much the alone answer's token was ahead of the next one, in nats,
where the two part: rounding differs with what else is in a batch, and can turn a near
tie. No answer, and nothing that abusers get, may have the secret of another client.

In the midst come all requests of `server_abuse.py`, clients that leave, with a million
tokens asked for, that read a byte a second, and a prompt above the model's context.
Resident memory of the server is taken twice a second. Ends with 1 if a secret was seen,
an answer is missing or differs by more than a near tie, a request got what is not right
for it, or the server grew, ended by itself or printed a traceback.

The last line is JSON.
"""

import argparse
import http.client
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abusers import WAIT, Abusers, wrong_statuses
from common import load_demo_model, provenance, resident
from server_abuse import CHAT, HOST, user

from tova_mlx.models.demo import demo_model_path

LIMIT, MAX_TOKENS = 36, 12
# A prompt of eight is as long as the longest of them, up to a step.
STEP = ("--prefill-step-size", "64")
# Tokens that the demo model was trained on at once.
CONTEXT = 8192
# Above it two tokens are no near tie: float32 rounds logits of 20 at 2e-6, times what
# passes through the layers.
NEAR_TIE = 0.01
# Bytes that a server may have more than after its first answers: batches, stored
# prompts and requests at their largest.
MOST_GROWTH = 500e6
THINGS = (
    *("a river", "a bird", "a king", "an ocean", "a fruit", "a metal", "a planet"),
    *("a poet", "a tree", "a city", "a fish", "a colour", "a tool", "a mountain"),
)


def words(n: int, seed: int = 0) -> list[str]:
    """Words of eight letters that no text has, all different."""
    draw, made = random.Random(seed), set()
    while len(made) < n:
        pairs = (draw.choice("bdfgklmnprtvz") + draw.choice("aeiou") for _ in range(4))
        made.add("".join(pairs))
    return sorted(made)


@dataclass
class Question:
    """secret: is in no other question. alone, margins: see `answer_alone`."""

    text: str
    secret: str
    alone: list[str] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


def questions(n: int) -> list[Question]:
    """Short questions, all different."""
    return [
        Question(f"Write a sentence about {THINGS[i % 14]} called {secret}.", secret)
        for i, secret in enumerate(words(n))
    ]


def answer_alone(model: Any, tokenizer: Any, question: Question, limit: int) -> None:
    """Answer by the library: the text after each token, and its lead over the next."""
    import mlx.core as mx
    from mlx_lm import stream_generate

    from tova_mlx import make_prompt_cache
    from tova_mlx.hooks.template import beginning_of
    from tova_mlx.models.conversion import pin_tokens

    def prompt_for(text: str) -> list[int]:
        return tokenizer.apply_chat_template([user(text)], add_generation_prompt=True)

    caches = make_prompt_cache(model, limit, positions="auto")
    pin_tokens(caches, len(beginning_of(prompt_for)))
    text = ""
    for step in stream_generate(
        model,
        tokenizer,
        prompt_for(question.text),
        max_tokens=MAX_TOKENS,
        prompt_cache=caches,
    ):
        text += step.text
        second, first = mx.topk(step.logprobs, 2).tolist()
        question.alone.append(text)
        question.margins.append(abs(first - second))


def margin_where_they_part(question: Question, text: str) -> float:
    """By how much the alone answer's token was ahead where another answer differs."""
    i = 0
    while i < len(question.alone) and text.startswith(question.alone[i]):
        i += 1
    return question.margins[min(i, len(question.margins) - 1)]


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int, Any]]:
    """A server that listens: its process, its port, and the file of what it prints."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tova_mlx", "serve", "--port", str(port)]
    with tempfile.TemporaryFile("w+") as printed:
        server = subprocess.Popen(
            [*command, "--log-level", "ERROR", *arguments], stderr=printed, text=True
        )
        try:
            while server.poll() is None:
                try:
                    socket.create_connection((HOST, port), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield server, port, printed
        finally:
            server.kill()
            server.wait()


def ask(port: int, question: Question, stream: bool) -> str | None:
    """The answer of a server, greedily; None and a word if there is none."""
    body = {"messages": [user(question.text)], "max_tokens": MAX_TOKENS}
    connection = http.client.HTTPConnection(HOST, port, timeout=WAIT)
    body |= {"temperature": 0, "stream": stream}
    try:
        connection.request("POST", CHAT, json.dumps(body))
        reply = connection.getresponse()
        said = reply.read().decode()
    except (OSError, http.client.HTTPException) as error:
        said, status = repr(error), 0
    else:
        status = reply.status
    events = [
        s.removeprefix("data: ") for s in said.split("\n") if s.startswith("data")
    ]
    if status != 200 or (stream and events[-1:] != ["[DONE]"]):
        print(f"no answer: {status} {said[-200:]}", file=sys.stderr)
        return None
    if not stream:
        return json.loads(said)["choices"][0]["message"]["content"] or ""
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    return "".join(delta.get("content", "") for delta in deltas)


def says(text: str, secret: str) -> bool:
    """Whether a text has a secret, also where a sentence begins with it."""
    return secret in text.lower()


def foreign(texts: list[tuple[str, str]], secrets: set[str]) -> int:
    """How many texts have another's secret; each comes with its own, or none."""
    return sum(any(says(text, s) for s in secrets - {own}) for own, text in texts)


def storm(
    arguments: tuple[str, ...],
    asked: list[Question],
    clients: int,
    context: int,
    times: int = 1,
) -> dict[str, Any]:
    """What many clients and some abusers get of a server, and what it takes.

    asked: answered alone before; each client has its share of them, and asks them so
    many times. context: words of a prompt that is too long; 0 for none.
    """
    samples: list[int] = []
    over = threading.Event()
    with serving(*arguments) as (server, port, printed):

        def sample() -> None:
            while server.poll() is None and not over.wait(0.5):
                samples.append(resident(server.pid))

        def client(i: int) -> list[tuple[Question, str | None]]:
            mine = asked[i::clients] * times
            return [(q, ask(port, q, (i + j) % 2 == 0)) for j, q in enumerate(mine)]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda q: ask(port, q, True), asked[:8]))
        warm = resident(server.pid)
        sampler = threading.Thread(target=sample)
        sampler.start()
        began, abusers = time.monotonic(), Abusers(port, context)
        with ThreadPoolExecutor(clients) as pool:
            given = [
                pair for pairs in pool.map(client, range(clients)) for pair in pairs
            ]
        seconds = time.monotonic() - began
        abusers.end()
        ended_after = time.monotonic() - began
        # It serves on, and what was stored meanwhile is right.
        given += [(q, ask(port, q, False)) for q in asked[:8]]
        over.set()
        sampler.join()
        final = resident(server.pid)
        ended = server.poll()
        server.send_signal(signal.SIGINT)
        code = server.wait(60)
        printed.seek(0)
        tracebacks = printed.read().count("Traceback")
    answers = [(q, text) for q, text in given if text is not None]
    ways: defaultdict[str, set[str]] = defaultdict(set)
    for question, text in answers:
        ways[question.secret].add(text)
    texts = [(q.secret, text) for q, text in answers]
    texts += [("", text) for text in abusers.texts]
    return {
        "arguments": [a for a in arguments if "/" not in a],
        "clients": clients,
        "seconds": round(seconds, 1),
        "seconds_with_abusers": round(ended_after, 1),
        "requests": 8 + len(given) + sum(c.total() for c in abusers.got.values()),
        "unanswered": len(given) - len(answers),
        "answers_checked": len(answers),
        "equal": sum(text == q.alone[-1] for q, text in answers),
        "different_questions": len(ways),
        "different_texts": len({text for _, text in answers}),
        "answered_in_two_ways": sum(len(texts) > 1 for texts in ways.values()),
        "own_secret_said": sum(says(text, q.secret) for q, text in answers),
        "different": [
            {
                "asked": q.text,
                "alone": q.alone[-1],
                "got": text,
                "margin": margin_where_they_part(q, text),
            }
            for q, text in answers
            if text != q.alone[-1]
        ],
        "foreign_text": foreign(texts, {q.secret for q in asked}),
        "abuse": {kind: dict(counts) for kind, counts in sorted(abusers.got.items())},
        "wrong_statuses": wrong_statuses(abusers.got),
        "ended_by_itself": ended,
        "exit": code,
        "tracebacks": tracebacks,
        "resident_warm": warm,
        "resident_most": max(samples),
        "resident_final": final,
        "resident_over_time": samples[:: max(1, len(samples) // 60)],
    }


def wrong(found: dict[str, Any]) -> list[str]:
    """Names of what must not be so."""
    checks = {
        "unanswered": found["unanswered"] > 0,
        "foreign_text": found["foreign_text"] > 0,
        "different": any(d["margin"] > NEAR_TIE for d in found["different"]),
        "wrong_statuses": bool(found["wrong_statuses"]),
        "ended_by_itself": found["ended_by_itself"] is not None,
        "exit": found["exit"] != 0,
        "resident": found["resident_final"] > found["resident_warm"] + MOST_GROWTH,
        "tracebacks": found["tracebacks"] > 0,
    }
    return [name for name, is_wrong in checks.items() if is_wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=56)
    parser.add_argument("--questions", type=int, default=1, help="for each client")
    parser.add_argument("--settings", nargs="+", default=["tova", "draft"])
    parser.add_argument("--out", type=Path, help="keeps settings that are not run")
    args = parser.parse_args()
    path = str(demo_model_path())
    common = (*("--model", path, "--max-kv-size", str(LIMIT)), *STEP)
    # Drafts are not batched: no prompt of minutes, which all would wait for.
    settings = {
        "tova": (common, CONTEXT + 100, 2),
        "draft": ((*common, "--draft-model", path), 0, 1),
    }
    model, tokenizer = load_demo_model()
    asked = questions(args.clients * args.questions)
    for i, question in enumerate(asked):
        answer_alone(model, tokenizer, question, LIMIT)
        print(f"{i + 1} of {len(asked)} answered alone", file=sys.stderr, end="\r")
    found = {}
    for name in args.settings:
        arguments, *how = settings[name]
        found[name] = storm(arguments, asked, args.clients, *how)
        found[name] |= {"wrong": wrong(found[name]), **provenance()}
        print(f"{name}: {json.dumps(found[name])}", file=sys.stderr)
    report = {"max_kv_size": LIMIT, "near_tie": NEAR_TIE, **found}
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        there = json.loads(args.out.read_text()) if args.out.exists() else {}
        args.out.write_text(json.dumps(there | report, indent=1) + "\n")
    print(json.dumps(report))
    sys.exit(any(each["wrong"] for each in found.values()))


if __name__ == "__main__":
    main()
