import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mlx_lm
import pytest
import tiny
from click.testing import CliRunner

from tova_mlx.cli import main, models
from tova_mlx.evaluation.lines import read_text

PROGRAM = (sys.executable, "-m", "tova_mlx")
BOM = b"\xef\xbb\xbf"


def run(*arguments, **options):
    return CliRunner().invoke(main, list(arguments), **options)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("x", "--max-kv-size", "1.5"), 2, "'1.5' is not a size. Use a number of"),
        (("x", "--policy", "lru"), 2, "'lru' is not one of"),
        (("x", "--model", "./nothing"), 1, "no such directory"),
        (("x", "--model", "~nobody/x"), 1, "no such directory"),
        (("x", "--model", "x" * 300), 1, "no such directory"),
        (("--prompt-file", "/nothing"), 2, "'/nothing' does not exist"),
        (("--prompt-file", "/"), 2, "'/' is a directory"),
        (("x", "--temp", "nan"), 2, "nan is not a finite number"),
        (("x", "--temp", "inf"), 2, "inf is not a finite number"),
        (("x", "--top-p", "nan"), 2, "nan is not a finite number"),
        (("x", "--seed", "-1"), 2, "-1 is not in the range"),
        (("x", "--seed", str(2**64)), 2, "is not in the range"),
        (("  ",), 1, "prompt is empty"),
        ((), 2, "Give PROMPT or --prompt-file"),
        (("x", "--prompt-file", os.devnull), 2, "one of them"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(arguments, code, message):
    result = run("generate", *arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if code == 1:
        assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


CANNOT_WORK = [
    (("--max-kv-size", "0"), "'--max-kv-size': 0 is not in the range"),
    (("--max-kv-size", "-5"), "'--max-kv-size': -5 is not in the range"),
    (("--policy", "streaming", "--max-kv-size", "4"), "--max-kv-size 4 leaves no room"),
]
CANNOT_WORK_FOR_A_CACHE = [
    *CANNOT_WORK,
    (("--n-sinks", "-1"), "'--n-sinks': -1 is not in the range"),
    (("--n-recent", "-1"), "'--n-recent': -1 is not in the range"),
    (("--memory", "2"), "'--memory': 2.0 is not in the range"),
    (("--memory", "nan"), "'--memory': nan is not a finite number"),
    (("--kv-bits", "3"), "use 4, 5, 6, 8, or a pair like 6h,4 of"),
    (("--kv-bits", "4,4,4"), "use 4, 5, 6, 8, or a pair like 6h,4 of"),
    (("--kv-bits", "true"), "use 4, 5, 6, 8, or a pair like 6h,4 of"),
    (("--policy", "window", "--n-sinks", "2"), "window does not read --n-sinks 2."),
    (
        ("--policy", "keydiff", "--no-value-weighted"),
        "keydiff does not read --no-value-weighted. Leave it out; the options of "
        "keydiff: --granularity, --n-sinks, --n-recent.",
    ),
    (
        ("--policy", "streaming", "--granularity", "head"),
        "does not read --granularity head. Leave it out; the options of streaming: "
        "--n-sinks.",
    ),
    (("--policy", "window", "--prefill", "once"), "does not read --prefill once"),
]


def check_usage_error(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2
    said = result.stderr.splitlines()[-1]
    assert message in said
    # Nor names of Python, which nobody typed.
    assert not re.search(r"\w=|\w_\w", said)


@pytest.mark.parametrize(("options", "message"), CANNOT_WORK_FOR_A_CACHE)
@pytest.mark.parametrize("command", ["generate", "chat", "serve", "run", "info"])
def test_a_value_that_cannot_work_is_a_usage_error(command, options, message):
    rest = {"generate": ("x",), "run": ("generate",)}.get(command, ())
    # If it is not refused, there is no model to go on with.
    arguments = (command, *options, *rest, "--model", "./nothing")
    check_usage_error(arguments, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *CANNOT_WORK,
        (("--seed", "-1"), "'--seed': -1 is not in the range"),
        (("--seed", str(2**63)), "is not in the range"),
    ],
)
@pytest.mark.parametrize("task", ["kept", "longrange", "needle", "perplexity"])
def test_a_value_that_cannot_be_evaluated_is_a_usage_error(
    tmp_path, task, options, message
):
    text = tmp_path / "novel.txt"
    text.write_text("Call me Ishmael.")
    check_usage_error(evaluation(task, text, *options), message)


@pytest.mark.parametrize("task", ["kept", "longrange", "needle", "perplexity"])
def test_a_text_that_is_not_there_is_a_usage_error(task):
    check_usage_error(evaluation(task, "/nothing"), "'/nothing' does not exist")
    check_usage_error(evaluation(task, "/"), "'/' is a directory")


@pytest.mark.parametrize(
    ("task", "option", "value"),
    [
        ("needle", "--depth", "nan"),
        ("needle", "--depth", "1.5"),
        ("needle", "--length", "0"),
        ("longrange", "--temp", "inf"),
    ],
)
def test_an_option_of_a_task_that_cannot_work_is_a_usage_error(
    tmp_path, task, option, value
):
    text = tmp_path / "novel.txt"
    text.write_text("Call me Ishmael.")
    check_usage_error(evaluation(task, text, option, value), f"'{option}': {value} is")


def evaluation(task, text, *options):
    text = ("--text", str(text)) if task in ("longrange", "needle") else (str(text),)
    return ("eval", task, *text, "--out", "out", "--model", "./nothing", *options)


def test_a_usage_error_does_not_import_mlx():
    code = (
        "import sys; from tova_mlx.cli import main\n"
        "try: main('generate x --policy streaming --max-kv-size 4'.split())\n"
        "except SystemExit as end: assert end.code == 2\n"
        "sys.exit('mlx' in sys.modules or 'mlx_lm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_only_the_model_shows_is_said_in_options_too(monkeypatch):
    monkeypatch.setattr(models, "load", lambda _: (tiny.make(), None, "tiny"))
    result = run("info", "--kv-bits", "4")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: --kv-group-size 64 does not divide rows of 8. Use 32, or leave "
        "--kv-bits out.\n"
    )


def test_a_prompt_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(BOM + "naïve".encode("latin-1"))
    result = run("generate", "--prompt-file", str(path))
    assert result.exit_code == 1
    assert "is not UTF-8 text (byte 5)" in result.stderr
    done = subprocess.run(
        [*PROGRAM, "generate", "café".encode("latin-1")], capture_output=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith(b"Error: PROMPT is not UTF-8 text (byte 3).")
    assert done.stderr.count(b"\n") == 1


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(BOM)
    for result in (
        run("generate", "--prompt-file", str(path)),
        run("generate", "-", input=BOM),
    ):
        assert result.exit_code == 1
        assert "prompt is empty" in result.stderr
    path.write_bytes(BOM + b"Call me Ishmael.")
    assert read_text(path) == "Call me Ishmael."


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "model").mkdir()
    result = run("generate", "--prompt-file=~/empty.txt")
    assert f"{tmp_path}/empty.txt: the prompt is empty" in result.stderr
    assert models.resolve("~/model") == str(tmp_path / "model")
    result = run(*evaluation("perplexity", "~/empty.txt"), "--out=~/empty.txt")
    assert "'--out': Directory '~/empty.txt' is a file" in result.stderr.replace(
        str(tmp_path), "~"
    )


@pytest.mark.parametrize("command", main.commands)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_has_an_example_and_does_not_import_mlx(command, option):
    code = (
        "import sys; from tova_mlx.cli import main\n"
        f"try: main(['{command}', '{option}'])\n"
        "except SystemExit: pass\n"
        "sys.exit('mlx' in sys.modules or 'mlx_lm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"Example: tova-mlx {command}" in done.stdout


def test_a_hub_cache_that_cannot_be_used_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    places = dict.fromkeys(("HF_HOME", "HF_HUB_CACHE"), str(tmp_path / "file"))
    done = subprocess.run(
        [*PROGRAM, "generate", "x", "--model", "owner/name"],
        env={**os.environ, **places, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: --model owner/name: cannot get it")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("when", ["loading", "reading"])
def test_ctrl_c_before_the_first_token_is_said(monkeypatch, when):
    def press(*_, **__):
        raise KeyboardInterrupt

    tokenizer = SimpleNamespace(chat_template=None, encode=lambda _: [1, 2])
    loaded = (tiny.make(), tokenizer, "tiny")
    monkeypatch.setattr(models, "load", lambda _: loaded)
    place, name = (models, "load") if when == "loading" else (mlx_lm, "stream_generate")
    monkeypatch.setattr(place, name, press)
    result = run("generate", "x")
    assert result.exit_code == 130
    assert (result.stdout, result.stderr) == ("", "Interrupted.\n")


@pytest.mark.real_model
@pytest.mark.parametrize("command", ["generate x --max-tokens 2", "info"])
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(demo_path, command, closed):
    program = [*PROGRAM, *command.split(), "--model", str(demo_path)]
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *program],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
    )
    assert (done.returncode, b"Error" in done.stderr) == (0, False), done.stderr
    assert bool(done.stdout) == (">&-" not in closed.split())


def test_a_closed_stdin_is_an_empty_prompt():
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *PROGRAM, "generate", "-"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: stdin: the prompt is empty.")


@pytest.mark.real_model
@pytest.mark.parametrize("command", ["generate x --max-tokens 2", "info --json"])
def test_a_reader_that_leaves_ends_the_command_quietly(demo_path, command):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*PROGRAM, *command.split(), "--model", str(demo_path)],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert done.returncode == 1
    assert not re.search("Traceback|Error", done.stderr)


def without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch, tmp_path):
    without_a_home(monkeypatch)
    for model in ((), ("--model", "demo")):
        result = run("generate", "x", *model)
        assert result.exit_code == 1
        assert "Set HOME or XDG_CACHE_HOME, or give --model" in result.stderr
        assert result.stderr.count("\n") == 1
    # A directory needs no home.
    assert models.resolve(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "info"])
def test_a_full_standard_output_is_one_line(command, unbuffered, tmp_path):
    program = (
        "from tova_mlx.cli import main, models; import tiny\n"
        "models.load = lambda _: (tiny.make(), None, 'tiny')\n"
        f"main(['{command}'])"
    )
    path = tmp_path / "full"
    path.symlink_to("/dev/full")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with path.open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parent,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == (
        "Error: standard output, or another stream: No space left on device.\n"
    )


def test_ctrl_c_while_a_library_is_imported_ends_at_once():
    # A library that makes another error of it, as MLX does, or loses it.
    program = """
import os, signal, sys
from tova_mlx.cli import main

class Press:
    def find_spec(self, name, *_):
        if name in ("mlx", "mlx.core"):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError("Encountered an error") from None

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Press())
main(["info", "--model", sys.argv[1]])
"""
    place = str(Path(__file__).parent)
    command = [sys.executable, "-c", program, place]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stderr) == (130, b"Interrupted.\n")


@pytest.mark.parametrize("ignored", [False, True])
def test_ctrl_c_while_the_program_is_imported_says_nothing(ignored):
    program = f"""
import os, runpy, signal, sys

class Press:
    def find_spec(self, name, *_):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
if {ignored}:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.meta_path.insert(0, Press())
sys.argv[1:] = ["--version"]
runpy.run_module("tova_mlx", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert done.stderr == b""
    # What a shell says 130 to; a job in the background goes on.
    assert done.returncode == (0 if ignored else -signal.SIGINT)
    assert bool(done.stdout) == ignored


def test_a_file_that_fails_is_named(monkeypatch):
    def fail(_):
        raise PermissionError(13, "Permission denied", "/etc/some file")

    monkeypatch.setattr(models, "load", fail)
    result = run("info")
    assert result.exit_code == 1
    assert result.stderr == "Error: /etc/some file: Permission denied.\n"


def test_any_text_can_be_shown(monkeypatch, tmp_path):
    said = "Ça va, 世界?"
    for stdin in (b"", said.encode(), b"\xff\xfe"):
        done = subprocess.run(
            [
                *(sys.executable, "-c"),
                "import click, sys\nfrom tova_mlx.cli import main\n"
                "@main.command()\n"
                f"def say(): click.echo({said!r}); click.echo({said!r}, err=True)\n"
                "main(['say'])",
            ],
            env={**os.environ, "PYTHONIOENCODING": "latin-1"},
            input=stdin,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == b"\xc7a va, ???\n"
        assert done.stderr == b"\xc7a va, \\u4e16\\u754c?\n"


@pytest.mark.real_model
@pytest.mark.parametrize(
    "command", ["generate x --max-tokens 2 --memory 0.5", "info --no-value-weighted"]
)
def test_the_default_policy_reads_every_option(demo_path, command):
    result = run(*command.split(), "--model", str(demo_path))
    assert result.exit_code == 0, (result.stderr, result.exception)


@pytest.mark.real_model
def test_generate_prints_one_object(demo_path):
    result = run(
        *("generate", "One two three four five six seven eight", "--json"),
        *("--no-chat-template", "--max-kv-size", "6", "--max-tokens", "5"),
        *("--model", str(demo_path)),
    )
    assert result.exit_code == 0, result.stderr
    got = json.loads(result.stdout)
    assert got["tokens_held"] == 6
    assert got["prompt_tokens"] == 8
    assert got["tokens_seen"] == got["prompt_tokens"] + got["generation_tokens"]
    assert got["cache_bytes"] == sum(row["bytes_now"] for row in got["layers"])
    assert got["policy"] == "tova"
    assert len(got["layers"]) == 30


@pytest.mark.real_model
def test_generate_ends_with_what_was_saved(demo_path, tmp_path):
    model = ("--model", str(demo_path), "--no-chat-template", "--max-tokens", "4")
    words = "one two three four five six seven eight " * 60
    last = run("generate", words, *model, "--max-kv-size", "32").stderr.splitlines()[-1]
    n = int(re.search(r"; 32 of (\d+) tokens are held per layer$", last)[1])
    # keys and values: 3 heads of 64 float32 each, 30 layers.
    unbounded = n * 30 * 2 * 3 * 64 * 4
    assert f" of {unbounded / 2**20:.1f} MiB; the cache takes " in last
    saved, taken = re.match(r"saved: (.*) MiB of .*takes (.*) MiB;", last).groups()
    assert float(saved) + float(taken) == pytest.approx(unbounded / 2**20, abs=0.11)
    # What is archived in memory is not saved, what is on disk is.
    recall = ("--max-kv-size", "48", "--recall", "16")
    for archive, where in (((), ""), (("--archive", str(tmp_path)), " on disk")):
        last = run("generate", words, *model, *recall, *archive).stderr.splitlines()[-1]
        saved, cache, archived = re.match(
            rf"saved: (.*) MiB of .*takes (.*) MiB, its archive (.*) MiB{where};", last
        ).groups()
        taken = float(cache) + (0 if where else float(archived))
        assert float(archived) > 0
        assert float(saved) + taken == pytest.approx(unbounded / 2**20, abs=0.16)
    last = run("generate", words[:999], *model, "--max-kv-size", "512").stderr
    assert last.splitlines()[-1].startswith("saved: nothing yet; the cache takes ")


@pytest.mark.real_model
def test_info_says_what_each_layer_would_get(demo_path):
    arguments = ("--model", str(demo_path), "--max-kv-size", "64")
    result = run("info", "--json", *arguments)
    assert result.exit_code == 0, result.stderr
    got = json.loads(result.stdout)
    assert got["path"] == str(demo_path)
    # keys and values: 3 heads of 64 float32 each; 65 slots.
    assert got["totals"]["bytes_at_most"] >= 30 * 65 * 2 * 3 * 64 * 4
    assert got["unbounded_bytes"]["8192"] == 30 * 8192 * 2 * 3 * 64 * 4
    assert "at most" in run("info", *arguments).stdout


@pytest.mark.real_model
def test_a_cut_off_model_file_is_refused(demo_path, tmp_path):
    for file in demo_path.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with (demo_path / "model.safetensors").open("rb") as whole:
        (tmp_path / "model.safetensors").write_bytes(whole.read(1_000_000))
    result = run("generate", "x", "--model", str(tmp_path))
    assert result.exit_code == 1
    assert "cut off" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.real_model
def test_ctrl_c_keeps_the_text_and_the_statistics(demo_path):
    # A job in the background of a shell inherits that Ctrl-C is ignored.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from tova_mlx.cli import main; main()"
    )
    command = [sys.executable, "-c", program, "generate", "Count to a thousand."]
    command += ["--model", str(demo_path), "--max-tokens", "5000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, statistics = process.communicate(timeout=120)
    assert process.returncode == 130
    assert (first + rest).strip()
    assert b"tokens seen:" in statistics
    assert b"Traceback" not in statistics


NO_BUDGETS = [
    ("0", "0 is not in the range x>=1"),
    ("-1GB", "'-1GB' is not a size. Use a number of tokens, bytes such as 2GB"),
    ("3 parsecs", "'3 parsecs' is not a size"),
    ("9999TB", "'9999TB' is more than the"),
    ("1kB", "--max-kv-size 1kB is too small: tova needs at least"),
    ("0GB", "--max-kv-size 0GB is too small: tova needs at least"),
]


@pytest.mark.real_model
@pytest.mark.parametrize(("size", "said"), NO_BUDGETS)
@pytest.mark.parametrize("command", ["generate", "chat", "info", "run", "eval"])
def test_a_budget_that_cannot_be_is_one_line(small_path, tmp_path, command, size, said):
    model = ("--model", str(small_path), "--max-kv-size", size)
    text = str(Path(__file__).parents[1] / "scripts/moby_dick_excerpt.txt")
    arguments = {
        "generate": ("generate", "x", *model),
        "chat": ("chat", *model),
        "info": ("info", *model),
        "run": ("run", *model[2:], "generate", *model[:2], "--prompt", "x"),
        "eval": ("eval", "perplexity", text, *model, "--out", str(tmp_path / "o")),
    }
    result = run(*arguments[command], input="")
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert said in last.replace("fade", "tova").replace("window", "tova")
    assert "Traceback" not in result.stderr


@pytest.mark.real_model
def test_info_says_what_a_budget_holds_with_fewer_bits(small_path):
    result = run("info", "--model", str(small_path), "--max-kv-size", "40MB")
    assert result.exit_code == 0, result.stderr
    assert "--max-kv-size 40MB: " in result.stderr
    lines = result.stdout.splitlines()
    first = lines.index("Per layer within 40MB:")
    rows = [line.split() for line in lines[first + 2 :]]
    assert [row[0] for row in rows] == ["none", "8", "6", "5", "4"]
    tokens = [
        int(re.search(r" (\d[\d,]{2,})\b", line)[1].replace(",", ""))
        for line in lines[first + 2 :]
    ]
    assert tokens == sorted(tokens)
    # 512 numbers of 32 bits against 8.5 and 5.5.
    assert 3 < tokens[1] / tokens[0] < 1.02 * 32 / 8.5
    assert 5 < tokens[4] / tokens[0] < 1.02 * 32 / 5.5
    told = json.loads(
        run(
            "info", "--model", str(small_path), "--max-kv-size", "40MB", "--json"
        ).stdout
    )
    assert [choice["tokens"] for choice in told["choices"]] == tokens
    assert told["max_kv_size"] == tokens[0]
    assert 0.99 * 40e6 < told["totals"]["bytes_at_most"] <= 40e6
    plain = json.loads(run("info", "--model", str(small_path), "--json").stdout)
    assert "choices" not in plain


@pytest.mark.real_model
def test_a_budget_is_said_and_kept(small_path):
    command = (
        "generate",
        "word " * 4000,
        "--model",
        str(small_path),
        "--max-tokens",
        "4",
    )
    for bits in ((), ("--kv-bits", "4")):
        result = run(
            *command, "--max-kv-size", "20MB", *bits, "--json", "--no-chat-template"
        )
        assert result.exit_code == 0, result.stderr
        assert "--max-kv-size 20MB: " in result.stderr
        assert 0.9 * 20e6 < json.loads(result.stdout)["cache_bytes"] <= 20e6
    auto = run(*command, "--max-kv-size", "auto", "--no-chat-template")
    assert "--max-kv-size auto: 90 % of (" in auto.stderr
