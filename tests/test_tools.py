"""mlx-lm's own tools on converted models: caches stay under the report's bound."""

import json
import os
import threading
from urllib.request import Request, urlopen

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx_lm import server

from tova_mlx import conversion
from tova_mlx.cli import main
from tova_mlx.report import describe

LIMIT = 48
PROMPT = "Name three rivers of Europe and say where each of them ends. " * 6
pytestmark = pytest.mark.real_model


@pytest.fixture
def made(monkeypatch):
    """Every list of caches that a converted model made, in order."""
    lists = []
    make = conversion._Maker.__call__

    def noted(self):
        lists.append(make(self))
        return lists[-1]

    monkeypatch.setattr(conversion._Maker, "__call__", noted)
    return lists


def run(demo_path, *arguments, cache=("--max-kv-size", str(LIMIT))):
    tool, *rest = arguments
    command = ["run", *cache, tool, "--model", str(demo_path), *rest]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result


def check_bound(caches, result):
    """The caches are full, and hold no more than the tool's user was told."""
    report = describe(caches)
    assert report.totals["tokens_held"] == LIMIT < report.totals["tokens_seen"]
    held = sum(a.nbytes for c in caches for a in c.state if isinstance(a, mx.array))
    assert held <= report.totals["bytes_at_most"]
    assert f"at most {report.totals['bytes_at_most']:,} bytes" in result.stderr


def test_mlx_lm_generate(demo_path, made):
    result = run(demo_path, "generate", "--prompt", PROMPT, "--max-tokens", "8")
    assert "Generation: 8 tokens" in result.stdout
    check_bound(made[-1], result)


def test_mlx_lm_generate_with_a_draft_model(demo_path, made):
    plain = ("generate", "--prompt", PROMPT, "--max-tokens", "8", "--verbose", "F")
    want = run(demo_path, *plain).stdout
    result = run(demo_path, *plain, "--draft-model", str(demo_path))
    assert result.stdout == want
    check_bound(made[-1], result)
    check_bound(made[-2], result)


def test_mlx_lm_cache_prompt_and_a_continuation(demo_path, made, tmp_path):
    file = str(tmp_path / "prompt.safetensors")
    arguments = ("--prompt", PROMPT, "--prompt-cache-file", file)
    result = run(demo_path, "cache_prompt", *arguments)
    check_bound(made[-1], result)
    loaded, _ = mx.load(file, return_metadata=True)
    assert (
        sum(a.nbytes for a in loaded.values())
        <= describe(made[-1]).totals["bytes_at_most"]
    )
    result = run(
        *(demo_path, "generate", "--prompt-cache-file", file),
        *("--prompt", "Answer.", "--max-tokens", "4"),
    )
    assert "Generation: 4 tokens" in result.stdout


def test_mlx_lm_chat(demo_path, made):
    command = ["run", "--max-kv-size", str(LIMIT), "--policy", "fade", "chat"]
    command += ["--model", str(demo_path), "--max-tokens", "6"]
    questions = f"{PROMPT}\nWhy?\nq\n"
    result = CliRunner().invoke(main, command, input=questions)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert made[-1][0].rule.policy == "fade"
    check_bound(made[-1], result)


def test_mlx_lm_server(demo_path, monkeypatch):
    messages = [{"role": "user", "content": PROMPT}]
    stored, seen = [], {}
    insert = server.LRUPromptCache.insert_cache

    def noted(self, model, tokens, caches, **how):
        stored.append(caches)
        insert(self, model, tokens, caches, **how)

    monkeypatch.setattr(server.LRUPromptCache, "insert_cache", noted)

    def ask(host, port, generator):
        # In a thread, or only Ctrl-C would end it.
        httpd = server.ThreadingHTTPServer(
            (host, 0), lambda *a: server.APIHandler(generator, *a)
        )
        threading.Thread(target=httpd.serve_forever).start()
        url = f"http://{host}:{httpd.server_address[1]}/v1/chat/completions"
        body = json.dumps({"messages": messages, "max_tokens": 6}).encode()
        headers = {"Content-Type": "application/json"}
        for _ in range(2):
            with urlopen(Request(url, body, headers)) as answer:
                seen["answer"] = json.load(answer)["choices"][0]["message"]["content"]
        httpd.shutdown()
        httpd.server_close()
        generator.stop_and_join()

    monkeypatch.setattr(server, "_run_http_server", ask)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    command = ["serve", "--model", str(demo_path), "--max-kv-size", str(LIMIT)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert seen["answer"]
    assert len(stored) >= 2
    for caches in stored:
        check_bound(caches, result)


def test_mlx_lms_own_option_quantises_bounded_caches(demo_path, made):
    bits = ("--kv-bits", "4", "--quantized-kv-start", "0")
    result = run(
        *(demo_path, "generate", "--prompt", PROMPT, "--max-tokens", "4"), *bits
    )
    assert "Generation: 4 tokens" in result.stdout


def test_a_tool_prints_its_own_help(capfd):
    result = CliRunner().invoke(main, ["run", "generate", "--help"])
    assert result.exit_code == 0
    assert "--prompt-cache-file" in result.output
