import json
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tova_mlx.cli import main


def run(*arguments, **options):
    return CliRunner().invoke(main, list(arguments), **options)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("x", "--max-kv-size", "0"), 1, "max_size=0 is not a whole number"),
        (("x", "--max-kv-size", "-4"), 1, "Use 1 or more"),
        (("x", "--max-kv-size", "1.5"), 2, "not a valid integer"),
        (("x", "--policy", "lru"), 2, "'lru' is not one of"),
        (("x", "--policy", "window", "--n-sinks", "2"), 1, "does not read n_sinks"),
        (("x", "--policy", "streaming", "--max-kv-size", "4"), 1, "at least 5"),
        (("x", "--model", "./nothing"), 1, "no such directory"),
        (("--prompt-file", "/nothing"), 1, "No such file"),
        (("  ",), 1, "prompt is empty"),
        ((), 2, "Give PROMPT or --prompt-file"),
        (("x", "--prompt-file", "y"), 2, "one of them"),
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


def test_a_prompt_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("naïve".encode("latin-1"))
    result = run("generate", "--prompt-file", str(path))
    assert result.exit_code == 1
    assert "is not UTF-8 text (byte 2)" in result.stderr


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
