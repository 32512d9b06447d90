"""mlx-lm's own tools on converted models: caches stay under the report's bound."""

import gc
import json
import os
import re
import shutil
import sys
import threading
import weakref
from pathlib import Path
from urllib.request import Request, urlopen

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_map
from mlx_lm import cache_prompt, load, server
from mlx_lm.models import cache as cache_module
from mlx_lm.models import llama
from mlx_lm.models.cache import KVCache
from mlx_lm.utils import save_model

from tova_mlx import make_prompt_cache
from tova_mlx.cli import main
from tova_mlx.cli.tools import replaced
from tova_mlx.models import conversion
from tova_mlx.models.report import describe
from tova_mlx.models.saved import save_prompt_cache

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


@pytest.fixture(scope="module")
def prompts(small_path, tmp_path_factory):
    """Prompt files of a small model: tova's, mlx-lm's own, a chat's, and damaged."""
    folder = tmp_path_factory.mktemp("prompts")
    model, _ = load(str(small_path))
    named = {"model": str(small_path), "tokenizer_config": "{}"}

    def save(name, caches, metadata=named):
        model(mx.array([[1, 2, 3]]), cache=caches)
        save_prompt_cache(folder / name, caches, model=model, metadata=metadata)

    save("tova", make_prompt_cache(model, LIMIT))
    save("full", make_prompt_cache(model, None, policy="full"))
    save("plain", [KVCache() for _ in model.layers])
    save("nobody's", make_prompt_cache(model, LIMIT), {})
    save("chat", make_prompt_cache(model, LIMIT), {"tova_mlx_chat": "[null, null]"})
    save("short", make_prompt_cache(model, LIMIT)[:1])
    elsewhere = named | {"model": "owner/name"}
    save("other", make_prompt_cache(model, LIMIT), elsewhere)
    model.update(tree_map(lambda a: a + 1, model.parameters()))
    save("tuned", make_prompt_cache(model, LIMIT))
    whole = (folder / "tova.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-100])
    (folder / "text.safetensors").write_text("Call me Ishmael.")
    (folder / "folder").mkdir()
    return folder


def go_on(cache, prompts, name, *more):
    """Run generate with a prompt file; the model is the one that it names."""
    command = ["run", *cache, "generate", "--prompt-cache-file", str(prompts / name)]
    options = ("--prompt", " Go on.", "--max-tokens", "4")
    # As in a process that has not used a cache of ours.
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("PolicyKVCache", "TOVACache"):
            patch.delattr(cache_module, kind, raising=False)
        return CliRunner().invoke(main, [*command, *options, *more])


TOVA = ("--max-kv-size", str(LIMIT))


@pytest.mark.parametrize(
    ("cache", "name", "more", "reasons"),
    [
        (TOVA, "nothing", (), ["no such file"]),
        (TOVA, "folder", (), ["no such file"]),
        (TOVA, ".", (), ["no name of a file", "no such file"]),
        (TOVA, "cut", (), ["not a whole saved prompt"]),
        (TOVA, "text", (), ["not a whole saved prompt"]),
        (TOVA, "plain", (), ["of mlx-lm's own", f"size={LIMIT}"]),
        (("--policy", "full", "--kv-bits", "8"), "plain", (), ["kv_bits=8h,8"]),
        (("--max-kv-size", "50"), "tova", (), ["size=48", "size=50"]),
        ((*TOVA, "--policy", "fade"), "tova", (), ["policy=tova", "policy=fade"]),
        (("--policy", "full"), "tova", (), ["policy=tova", "policy=full"]),
        (TOVA, "full", (), ["policy=full", "policy=tova"]),
        ((*TOVA, "--prefill", "once"), "tova", (), ["=stepwise", "=once"]),
        ((*TOVA, "--kv-bits", "4"), "tova", (), ["kv_bits=6h,4"]),
        ((*TOVA, "--n-sinks", "4"), "tova", (), ["n_sinks=0", "n_sinks=4"]),
        (TOVA, "nobody's", (), ["has no model and tokenizer_config"]),
        (TOVA, "chat", (), ["/save", "/load"]),
        (TOVA, "short", (), ["1 layers", "has 2"]),
        (TOVA, "other", ("--model", "{small}"), ["model=owner/name", "{small}"]),
        (TOVA, "tuned", (), ["saved with another model"]),
        (
            TOVA,
            "tova",
            ("--draft-model", "{small}", "--num-draft-tokens", "17"),
            ["16 drafted tokens", "is 17"],
        ),
    ],
)
def test_a_prompt_file_that_does_not_fit_is_refused_before_any_text(
    prompts, small_path, cache, name, more, reasons
):
    more = [word.format(small=small_path) for word in more]
    result = go_on(cache, prompts, name, *more)
    assert result.exit_code == 1
    assert result.stdout == ""
    said = result.stderr.splitlines()[-1]
    assert said.startswith("Error: ")
    wanted = [reason.format(small=small_path) for reason in reasons]
    if name != ".":
        assert str(prompts / name) in said
        # An option is named as in Python or as on the command line.
        said = re.sub(r"--([a-z-]+) ", lambda m: m[1].replace("-", "_") + "=", said)
        said = re.sub(r"=\((\d), \1\)", r"=\1", said)
        assert [reason for reason in wanted if reason not in said] == []


@pytest.mark.parametrize(
    ("cache", "name"),
    [(TOVA, "tova"), (("--policy", "full"), "full"), (("--policy", "full"), "plain")],
)
def test_a_prompt_file_that_fits_goes_on(prompts, small_path, cache, name):
    texts = set()
    for draft in ((), ("--draft-model", str(small_path))):
        result = go_on(cache, prompts, name, "--verbose", "F", *draft)
        assert result.exit_code == 0, (result.stderr, result.exception)
        texts.add(result.stdout)
    assert len(texts) == 1
    # Random weights say what they like, newlines too: more than the one that ends it.
    assert len(texts.pop()) > 1


def test_a_prompt_file_of_the_home_directory_and_of_a_model_named_otherwise(
    prompts, small_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(prompts))
    monkeypatch.chdir(small_path.parent)
    name = f"./{small_path.name}"
    result = go_on(TOVA, Path("~"), "tova", "--model", name, "--verbose", "F")
    assert result.exit_code == 0, (result.stderr, result.exception)


def test_mlx_lms_packed_caches_go_on_without_a_limit(small_path, tmp_path):
    file = ("--prompt-cache-file", str(tmp_path / "packed.safetensors"))
    packed = ("--kv-bits", "8", "--quantized-kv-start", "0")
    command = ["cache_prompt", "--model", str(small_path), "--prompt", PROMPT, *file]
    with replaced(sys, argv=[*command, *packed]):
        cache_prompt.main()
    command = ["run", "--policy", "full", "generate", *file, "--prompt", " Go on."]
    result = CliRunner().invoke(main, [*command, *packed, "--max-tokens", "4"])
    assert result.exit_code == 0, (result.stderr, result.exception)
    # A mistake of the user that mlx-lm finds is one line too.
    result = CliRunner().invoke(main, [*command, "--kv-bits", "4"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: mlx_lm.generate: --kv-bits does not match")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--max-tokens", "0"), "must be non-zero"),
        (("--chat-template-config", "{"), "not JSON"),
        (("--prompt", "", "--ignore-chat-template"), "must be provided"),
        (("--draft-model", "{other}"), "tokenizer does not match"),
        (("--image", "nothing.png"), "does not take images"),
    ],
)
def test_a_mistake_that_mlx_lm_finds_is_one_line(
    small_path, demo_path, tmp_path, arguments, reason
):
    shutil.copytree(small_path, tmp_path / "other")
    tokenizer = json.loads((small_path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["Ishmael!"] = 49152
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((small_path / "config.json").read_text())
    config["vocab_size"] = 49153
    larger = llama.Model(llama.ModelArgs.from_dict(config))
    save_model(tmp_path / "other", larger)
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    arguments = [
        a.format(other=tmp_path / "other") if "{o" in a else a for a in arguments
    ]
    command = ["run", "generate", "--model", str(small_path), "--prompt", "Why?"]
    result = CliRunner().invoke(main, [*command, *arguments])
    assert result.exit_code == 1
    said = result.stderr.splitlines()[-1]
    assert said.startswith("Error: mlx_lm.generate: ")
    assert reason in said


def test_a_mistake_of_ours_keeps_its_traceback(small_path, monkeypatch):
    def broken(*_, **__):
        raise ValueError("ours")

    monkeypatch.setattr(conversion, "describe", broken)
    command = ["run", "generate", "--model", str(small_path), "--prompt", "Why?"]
    result = CliRunner().invoke(main, command)
    assert isinstance(result.exception, ValueError)
    assert str(result.exception) == "ours"


def test_more_drafts_than_the_usual_caches_take_back(demo_path, small_path):
    plain = ("generate", "--prompt", PROMPT, "--max-tokens", "18", "--verbose", "F")
    want = run(demo_path, *plain).stdout
    draft = ("--draft-model", str(small_path), "--num-draft-tokens")
    assert run(demo_path, *plain, *draft, "20").stdout == want
    assert run(demo_path, *plain, *draft, "0").stdout == want
    command = ["run", "generate", "--model", str(demo_path), *draft, "-1"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "--num-draft-tokens -1" in result.stderr


@pytest.mark.parametrize("place", ["nowhere/prompt", "."])
def test_a_prompt_is_not_read_for_a_file_that_cannot_be_written(
    small_path, tmp_path, monkeypatch, place
):
    monkeypatch.chdir(tmp_path)
    command = ["run", "cache_prompt", "--model", str(small_path), "--prompt", PROMPT]
    result = CliRunner().invoke(main, [*command, "--prompt-cache-file", place])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")


def test_mlx_lm_chat(demo_path, made):
    command = ["run", "--max-kv-size", str(LIMIT), "--policy", "fade", "chat"]
    command += ["--model", str(demo_path), "--max-tokens", "6"]
    # The end of the input ends it as the letter q does.
    for questions in (f"{PROMPT}\nWhy?\nq\n", f"{PROMPT}\nWhy?\n"):
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

    def ask(host, port, generator, **_):
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
    command += ["--port", "0"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert seen["answer"]
    assert len(stored) >= 2
    for caches in stored:
        check_bound(caches, result)


def test_a_server_lets_go_of_a_model_when_another_is_asked_for(
    small_path, tmp_path, monkeypatch
):
    other = shutil.copytree(small_path, tmp_path / "other")
    seen = {}

    def ask(host, port, generator, **_):
        provider = generator.model_provider
        first = weakref.ref(provider.model)
        provider.load(str(other))
        gc.collect()
        seen["first"] = first()
        generator.stop_and_join()

    monkeypatch.setattr(server, "_run_http_server", ask)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    result = CliRunner().invoke(
        main, ["serve", "--model", str(small_path), "--port", "0"]
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert seen == {"first": None}


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
