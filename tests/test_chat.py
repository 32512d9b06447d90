"""The chat: its turns over one cache, and the program in a terminal and in a pipe."""

import re
import subprocess
import sys

import pexpect
import pytest
from mlx_lm import generate
from mlx_lm.models.cache import KVCache

from tova_mlx import convert, revert
from tova_mlx.chat import Conversation
from tova_mlx.errors import CacheStateError, PromptError

pytestmark = pytest.mark.real_model
PROGRAM = [sys.executable, "-m", "tova_mlx", "chat"]
QUESTION = "What is the capital of France? Answer in one word."
COUNT = "Count from one to a thousand, one number per line."


@pytest.fixture
def start(demo):
    """A function that makes a conversation with the demo model."""
    model, tokenizer = demo

    def make(max_kv_size=4096, **options):
        convert(model, max_kv_size, journal=0)
        return Conversation(model, tokenizer, **{"max_tokens": 40} | options)

    yield make
    revert(model)


def say(conversation, text):
    return "".join(piece.text for piece in conversation.ask(text))


def seen(conversation):
    return conversation.caches[0].offset


@pytest.mark.parametrize("max_tokens", [40, 5], ids=["ended", "cut off"])
@pytest.mark.parametrize("system_prompt", [None, "You are terse."])
def test_turns_are_those_of_the_whole_conversation(
    start, demo, max_tokens, system_prompt
):
    conversation = start(system_prompt=system_prompt, max_tokens=max_tokens)
    first = say(conversation, QUESTION)
    second = say(conversation, "And of Italy?")
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And of Italy?"},
    ]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    model, tokenizer = demo
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    unbounded = [KVCache() for _ in model.layers]
    want = generate(
        model, tokenizer, prompt, prompt_cache=unbounded, max_tokens=max_tokens
    )
    assert second == want
    assert seen(conversation) == unbounded[0].offset


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(start):
    conversation = start()
    pieces = []
    for piece in conversation.ask(COUNT, stop=lambda: len(pieces) == 3):
        pieces.append(piece.text)
    assert len(pieces) == 3
    assert len({c.offset for c in conversation.caches}) == 1
    before = seen(conversation)
    assert say(conversation, "Why?")
    assert seen(conversation) > before


def test_a_question_that_was_not_read_to_its_end_starts_anew(start):
    conversation = start(prefill_step_size=8)
    say(conversation, QUESTION)
    with pytest.raises(CacheStateError, match="starts anew"):
        list(conversation.ask(COUNT, stop=lambda: True))
    assert seen(conversation) == 0
    assert say(conversation, QUESTION)


def test_an_empty_question_changes_nothing(start):
    conversation = start()
    with pytest.raises(PromptError, match="question is empty"):
        say(conversation, "  ")
    assert seen(conversation) == 0


def test_a_saved_conversation_goes_on_in_another(start, tmp_path):
    file = tmp_path / "chat.safetensors"
    conversation = start(max_kv_size=24, system_prompt="You are terse.")
    say(conversation, QUESTION)
    conversation.save(file)
    want = say(conversation, "And of Italy?")
    other = start(max_kv_size=24)
    other.load(file)
    assert say(other, "And of Italy?") == want
    assert seen(other) == seen(conversation)
    file.write_bytes(file.read_bytes()[:5000])
    held = seen(other)
    with pytest.raises(CacheStateError, match="not a whole saved prompt"):
        other.load(file)
    assert seen(other) == held


def totals(said):
    """Tokens seen, held and bytes of every answer."""
    found = re.findall(r"(\d+) tokens seen, (\d+) held, cache ([\d,]+) bytes", said)
    return [tuple(int(n.replace(",", "")) for n in row) for row in found]


def test_two_hundred_turns_keep_the_bytes_constant(small_path):
    command = [*PROGRAM, "--model", str(small_path), "--max-kv-size", "32"]
    questions = "".join(f"Question {i}: what comes now?\n" for i in range(200))
    done = subprocess.run(
        [*command, "--max-tokens", "3"], input=questions, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    turns = totals(done.stderr)
    assert len(turns) == 200
    assert turns[-1][0] > 100 * 32
    assert {held for _, held, _ in turns[1:]} == {32}
    assert len({size for _, _, size in turns[1:]}) == 1
    assert len(done.stdout.splitlines()) >= 200


def test_a_pipe_gets_answers_and_nothing_else_on_stdout(demo_path, tmp_path):
    file = tmp_path / "chat.safetensors"
    lines = f"{QUESTION}\n\n/nonsense\n/save {file}\n/save\n/reset\n/load {file}\n"
    lines += "/load nowhere\n/stats\n/help\n/exit\nnot read\n"
    done = subprocess.run(
        [*PROGRAM, "--model", str(demo_path)],
        input=b"caf\xe9?\n" + lines.encode(),
        capture_output=True,
    )
    out, said = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, said
    assert "Paris" in out
    assert "tokens seen" not in out
    assert "Error: /nonsense is no command" in said
    assert "Error: /save needs a FILE" in said
    assert "Error: nowhere: no such file" in said
    assert "TOVACache" in said
    assert "/load FILE   go on" in said
    asked, loaded = totals(said)[1:]
    assert asked == loaded
    assert "Traceback" not in said


def test_a_terminal_session(demo_path, tmp_path):
    file = tmp_path / "chat.safetensors"
    chat = pexpect.spawn(
        PROGRAM[0],
        [*PROGRAM[1:], "--model", str(demo_path), "--max-kv-size", "64"],
        encoding="utf-8",
        timeout=120,
        dimensions=(40, 120),
    )
    ready, answered = "›", r"(\d+) tokens seen, (\d+) held, cache [\d,]+ bytes"
    chat.expect("commands.*/help")
    chat.expect(ready)
    chat.sendline(QUESTION)
    chat.expect("Paris")
    chat.expect(answered)
    chat.expect(ready)
    # Ctrl-C stops the answer, not the program.
    chat.sendline("Tell me a long story about a whale.")
    chat.expect("great")
    chat.sendintr()
    chat.expect(r"\[stopped\]")
    chat.expect(answered)
    seen = chat.match.group(1)
    chat.expect(ready)
    chat.sendintr()
    chat.expect("Type /exit or Ctrl-D to leave")
    chat.expect(ready)
    chat.sendline(f"/save {file}")
    chat.expect("Saved to")
    chat.expect(ready)
    chat.sendline("/reset")
    chat.expect("starts anew")
    chat.expect(ready)
    chat.sendline(f"/load {file}")
    chat.expect(f"Loaded: {seen} tokens seen")
    chat.expect(ready)
    # What was typed comes back.
    chat.send("\x1b[A")
    chat.expect("load")
    chat.send("\x1b[A")
    chat.expect("reset")
    chat.sendline("")
    chat.expect("starts anew")
    chat.expect(ready)
    chat.sendline("/stats")
    chat.expect("TOVACache")
    chat.expect(ready)
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
