"""The chat: its turns over one cache, and the program in a terminal and in a pipe."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pexpect
import pytest
import zoo
from mlx_lm import generate, load
from mlx_lm.models.cache import KVCache

import tova_mlx.models.conversation
from tova_mlx import convert, revert
from tova_mlx.cli.chat import _CtrlC
from tova_mlx.errors import CacheStateError, PromptError
from tova_mlx.models.conversation import Conversation

pytestmark = pytest.mark.real_model
PROGRAM = [sys.executable, "-m", "tova_mlx", "chat"]
QUESTION = "What is the capital of France? Answer in one word."
COUNT = "Count from one to a thousand, one number per line."
# That of a terminal that knows nothing but ASCII.
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def start(demo):
    """A function that makes a conversation with the demo model."""
    model, tokenizer = demo

    def make(max_kv_size=4096, policy="tova", **options):
        convert(model, max_kv_size, policy=policy, journal=0)
        return Conversation(model, tokenizer, **{"max_tokens": 40} | options)

    yield make
    revert(model)


@pytest.fixture(scope="module")
def small(small_path):
    model, tokenizer = load(str(small_path))
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model, tokenizer


@pytest.fixture
def small_start(small):
    """As `start`, with a small model of random weights."""
    model, tokenizer = small

    def make(max_kv_size=32, policy="tova", **options):
        convert(model, max_kv_size, policy=policy, journal=0)
        return Conversation(model, tokenizer, **{"max_tokens": 20} | options)

    return make


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


def hear(conversation, text, pieces):
    """As many pieces of an answer, and no more."""
    answer = conversation.ask(text)
    for _ in range(pieces):
        next(answer)
    answer.close()


def test_an_answer_that_nobody_hears_to_its_end_was_given(small_start):
    conversation, other = small_start(), small_start()
    hear(conversation, COUNT, 3)
    heard = []
    for piece in other.ask(COUNT, stop=lambda: len(heard) == 3):
        heard.append(piece.text)
    assert conversation._turns == other._turns == [(COUNT, "".join(heard), False)]
    assert seen(conversation) == seen(other)
    assert say(conversation, "Why?") == say(other, "Why?")


def held(conversation):
    return [[np.array(a) for a in c.keys_and_values()] for c in conversation.caches]


def after_layer(conversation, layer, function, monkeypatch):
    """Call a function after every attention of a layer."""
    attention = conversation.model.layers[layer].self_attn
    kind = type(attention)
    original = kind.__call__

    def call(self, *arguments, **options):
        output = original(self, *arguments, **options)
        if self is attention:
            function()
        return output

    monkeypatch.setattr(kind, "__call__", call)


class Unlucky(BaseException):
    """As KeyboardInterrupt, but nobody else's."""


@pytest.mark.parametrize("policy", ["tova", "fade", "streaming", "full"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, Unlucky])
@pytest.mark.parametrize("where", ["between", "within"])
def test_a_question_that_was_not_read_to_its_end_was_not_asked(
    small_start, monkeypatch, policy, error, where
):
    conversation = small_start(32, prefill_step_size=8, policy=policy)
    say(conversation, QUESTION)
    before, offset = held(conversation), seen(conversation)
    other = small_start(32, prefill_step_size=8, policy=policy)
    other.caches = copy.deepcopy(conversation.caches)
    other._turns = list(conversation._turns)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise error("here")

    with monkeypatch.context() as patch:
        if where == "within":
            after_layer(conversation, 0, fail, patch)
        with pytest.raises(error, match="here"):
            list(conversation.ask(COUNT, fail if where == "between" else bool))
    assert len(calls) == 3
    assert {c.offset for c in conversation.caches} == {offset}
    for mine, old in zip(held(conversation), before, strict=True):
        assert all(map(np.array_equal, mine, old))
    assert say(conversation, "And of Italy?") == say(other, "And of Italy?")


def test_a_stopped_question_was_not_asked(small_start):
    conversation = small_start(prefill_step_size=8)
    with pytest.raises(CacheStateError, match="as before it"):
        list(conversation.ask(COUNT, stop=lambda: True))
    assert not conversation.begun
    assert say(conversation, QUESTION) == say(small_start(), QUESTION)
    offset = seen(conversation)
    with pytest.raises(CacheStateError, match="as before it"):
        list(conversation.ask(COUNT, stop=lambda: True))
    assert seen(conversation) == offset


def fails(conversation, where, error, monkeypatch):
    """Whether the step after an answer's third piece, which fails, ends it so."""
    answer = conversation.ask(COUNT)
    for _ in range(3):
        next(answer)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        if where == "after all":
            patch.setattr(mx, "logsumexp", fail)
        else:
            after_layer(conversation, where, fail, patch)
        try:
            next(answer)
        except BaseException as raised:
            return raised is error or raised


@pytest.mark.parametrize("policy", ["tova", "streaming", "keydiff", "full"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("here")])
@pytest.mark.parametrize("where", [0, 1, "after all"])
def test_a_step_of_an_answer_that_fails_is_taken_back(
    small_start, monkeypatch, policy, error, where
):
    conversation, other = (small_start(32, policy=policy) for _ in range(2))
    assert fails(conversation, where, error, monkeypatch) is True
    hear(other, COUNT, 3)
    assert [c.offset for c in conversation.caches] == [c.offset for c in other.caches]
    assert conversation._turns == other._turns
    assert say(conversation, "Why?") == say(other, "Why?")


def test_what_cannot_be_taken_back_is_read_again(small_start, monkeypatch):
    conversation, other = (small_start(32, policy="fade") for _ in range(2))
    for one in (conversation, other):
        say(one, QUESTION)
    raised = fails(conversation, 0, RuntimeError("here"), monkeypatch)
    assert isinstance(raised, CacheStateError)
    assert "(here)" in str(raised)
    assert "all that was said is read again" in str(raised)
    hear(other, COUNT, 3)
    assert conversation._turns == other._turns
    assert conversation.is_unread
    assert seen(conversation) == 0
    # As a new conversation that is told all of it at once.
    fresh = small_start(32, policy="fade")
    want = read_at_once(fresh, [*other._turns, ("Why?", "", False)])
    assert say(conversation, "Why?") == want
    assert not conversation.is_unread
    assert len(conversation._turns) == 3
    assert fails(conversation, 0, KeyboardInterrupt(), monkeypatch) is True
    assert conversation.is_unread
    assert len(conversation._turns) == 4
    # All layers have seen the same, if more than what was answered.
    conversation = small_start(32, policy="fade")
    assert fails(conversation, "after all", RuntimeError("here"), monkeypatch) is True
    assert conversation.begun
    assert not conversation.is_unread
    assert say(conversation, "Why?")


def read_at_once(conversation, turns):
    """The answer to the last question after all turns before it."""
    messages = []
    for question, answer, _ in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    prompt = conversation.tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True
    )
    caches = conversation.caches
    how = {"max_tokens": conversation.options["max_tokens"], "prompt_cache": caches}
    return generate(conversation.model, conversation.tokenizer, prompt, **how)


def test_what_is_unread_is_saved_so(small_start, monkeypatch, tmp_path):
    conversation = small_start(32, policy="fade")
    fails(conversation, 0, RuntimeError("here"), monkeypatch)
    conversation.save(tmp_path / "chat.safetensors")
    other = small_start(32, policy="fade")
    other.load(tmp_path / "chat.safetensors")
    assert other.is_unread
    assert other._turns == conversation._turns
    assert say(other, "Why?") == say(conversation, "Why?")


def test_a_model_with_other_states_is_read_again(demo, monkeypatch):
    # Nothing says whether a state has seen the token of a step that failed.
    model = zoo.make("falcon_h1")
    convert(model, 12, journal=0)
    conversation = Conversation(model, demo[1], max_tokens=9)
    monkeypatch.setattr(conversation, "_encode", lambda _: [5, 6, 7])
    hear(conversation, "a", 2)
    assert conversation.begun
    raised = fails(conversation, "after all", RuntimeError("here"), monkeypatch)
    assert isinstance(raised, CacheStateError)
    assert conversation.is_unread


def test_the_copy_is_gone_when_the_answer_begins(small):
    model, tokenizer = small
    convert(model, 3000, policy="streaming", journal=0)
    conversation = Conversation(model, tokenizer, max_tokens=30, prefill_step_size=512)
    before = mx.get_active_memory()
    # The second time with caches that are full.
    for _ in range(2):
        for i, _ in enumerate(conversation.ask("one two three " * 1200)):
            if i == 3:
                size = sum(c.nbytes for c in conversation.caches)
                assert size > 80 << 20
                assert mx.get_active_memory() - before < 1.3 * size
                mx.reset_peak_memory()
        assert mx.get_peak_memory() - before < 1.3 * size


def test_an_empty_question_changes_nothing(start):
    conversation = start()
    with pytest.raises(PromptError, match="question is empty"):
        say(conversation, "  ")
    assert seen(conversation) == 0


def test_text_that_is_no_text_is_read_all_the_same(small_start):
    conversation = small_start(max_tokens=3, system_prompt="Be \ud800 terse.")
    assert say(conversation, "caf\udce9? \ud83d\ude00 \ud800")
    assert conversation._turns[-1].question == "caf\ufffd? \U0001f600 \ufffd"
    assert say(conversation, "Why?")


# Templates as of other models, in tokens that the demo model has.
LLAMA_3 = """\
{{- '<|endoftext|>' }}
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n\\n' }}
{{- message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"""
QWEN_3 = """\
{%- for message in messages %}
{%- set content = message['content'] %}
{%- if message['role'] == 'assistant' and not loop.last and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
# The system message goes before the newest question.
MISTRAL = """\
{%- set system = '' %}
{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] + '\\n\\n' %}
{%- set messages = messages[1:] %}
{%- endif %}
{{- '<|endoftext|>' }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + (system if loop.last else '') + message['content'] + ' [/INST]' }}
{%- else %}{{- message['content'] | trim + '<|im_end|>' }}{%- endif %}
{%- endfor %}"""
SHOUTS = LLAMA_3.replace("| trim", "| trim | upper")
REFUSES = "{{ raise_exception('System role not supported') }}"

CUT = ("One,\ntwo,\n", "length")
ENDED = ("Three.", "stop")
THOUGHT = ("<think>\nHm.\n</think>\n\nSo be it.", "stop")
BROKEN_OFF = ("<think>\nHm.", "length")


@pytest.fixture
def scripted(demo, monkeypatch):
    """Makes a conversation with a template and answers, and a list of what is fed."""
    model, tokenizer = demo

    def make(template, *answers, system_prompt="Be terse."):
        monkeypatch.setattr(tokenizer._tokenizer, "chat_template", template)
        convert(model, 64, journal=0)
        fed, left = [], list(answers)

        def stream_generate(model, tokenizer, tokens, **_):
            fed.append(tokens)
            text, reason = left.pop(0)
            for i, letter in enumerate(text, 1):
                last = i == len(text)
                yield SimpleNamespace(
                    text=letter, token=0, finish_reason=reason if last else None
                )

        monkeypatch.setattr(
            tova_mlx.models.conversation, "stream_generate", stream_generate
        )
        return Conversation(model, tokenizer, system_prompt=system_prompt), fed

    yield make
    revert(model)


def turn(role, content, gap="\n\n", end="<|im_end|>"):
    return f"<|im_start|>{role}{gap}{content}{end}"


@pytest.mark.parametrize("first", [CUT, ENDED])
@pytest.mark.parametrize("second", [CUT, ENDED])
def test_a_template_that_trims_is_fed_turn_by_turn(scripted, demo, first, second):
    conversation, fed = scripted(LLAMA_3, first, second, ENDED)
    for question in ("One? ", "Two?", "Three?"):
        say(conversation, question)
    ask = "<|im_start|>assistant\n\n"
    # An end that the model gave is not fed again.
    ends = ["" if a == ENDED else "<|im_end|>" for a in (first, second)]
    assert [demo[1].decode(tokens) for tokens in fed] == [
        "<|endoftext|>" + turn("system", "Be terse.") + turn("user", "One?") + ask,
        ends[0] + turn("user", "Two?") + ask,
        ends[1] + turn("user", "Three?") + ask,
    ]


@pytest.mark.parametrize("first", [CUT, ENDED, THOUGHT, BROKEN_OFF])
@pytest.mark.parametrize("second", [CUT, ENDED, THOUGHT, BROKEN_OFF])
def test_a_template_that_drops_thoughts_is_fed_turn_by_turn(
    scripted, demo, first, second
):
    conversation, fed = scripted(QWEN_3, first, second, ENDED)
    for question in ("One?", "Two? theanswer", "Three?"):
        say(conversation, question)
    ends = ["" if a[1] == "stop" else "<|im_end|>" for a in (first, second)]

    def asked(question):
        end = "<|im_end|>\n<|im_start|>assistant\n"
        return turn("user", question, "\n", end)

    assert [demo[1].decode(tokens) for tokens in fed] == [
        turn("system", "Be terse.", "\n", "<|im_end|>\n") + asked("One?"),
        ends[0] + "\n" + asked("Two? theanswer"),
        ends[1] + "\n" + asked("Three?"),
    ]


def test_a_system_message_that_moves_is_fed_once(scripted, demo):
    conversation, fed = scripted(MISTRAL, CUT, ENDED, CUT)
    for question in ("One?", "Two?", "Three?"):
        say(conversation, question)
    assert [demo[1].decode(tokens) for tokens in fed] == [
        "<|endoftext|>[INST] Be terse.\n\nOne? [/INST]",
        "<|im_end|>[INST] Two? [/INST]",
        "[INST] Three? [/INST]",
    ]


@pytest.mark.parametrize("template", [LLAMA_3, QWEN_3])
def test_an_answer_nobody_heard_to_its_end_is_closed(scripted, demo, template):
    conversation, fed = scripted(template, ENDED, ENDED)
    next(answer := conversation.ask("One?"))
    answer.close()
    assert conversation._turns == [("One?", "T", False)]
    say(conversation, "Two?")
    assert demo[1].decode(fed[1]).startswith("<|im_end|>")


def test_a_template_that_rewrites_answers_is_fed_anew(scripted, demo):
    conversation, fed = scripted(SHOUTS, CUT, ENDED, ENDED)
    say(conversation, "One?")
    caches = conversation.caches
    say(conversation, "Two?")
    assert conversation.caches is not caches
    say(conversation, "Three?")
    ask = "<|im_start|>assistant\n\n"
    begin = "<|endoftext|>" + turn("system", "BE TERSE.")
    answer = turn("assistant", "ONE,\nTWO,")
    assert [demo[1].decode(tokens) for tokens in fed] == [
        begin + turn("user", "ONE?") + ask,
        begin + turn("user", "ONE?") + answer + turn("user", "TWO?") + ask,
        # Nothing that was said is left out.
        begin
        + turn("user", "ONE?")
        + answer
        + turn("user", "TWO?")
        + turn("assistant", ENDED[0].upper())
        + turn("user", "THREE?")
        + ask,
    ]


def test_a_template_that_refuses_is_one_line(scripted):
    conversation, _ = scripted(REFUSES, ENDED)
    with pytest.raises(PromptError, match="System role not supported"):
        say(conversation, "One?")
    assert not conversation.begun


def test_all_that_a_real_answer_saw_is_what_was_fed(start, demo, monkeypatch):
    # The demo model, cut off after a line, under a template that trims.
    tokenizer = demo[1]
    monkeypatch.setattr(tokenizer._tokenizer, "chat_template", LLAMA_3)
    real, fed = tova_mlx.models.conversation.stream_generate, []

    def stream_generate(model, tokenizer, tokens, **how):
        fed.extend(tokens)
        for piece in real(model, tokenizer, tokens, **how):
            fed.append(piece.token)
            yield piece

    monkeypatch.setattr(
        tova_mlx.models.conversation, "stream_generate", stream_generate
    )
    # It says nothing but new lines.
    line = mx.array(tokenizer.encode("\n", add_special_tokens=False))
    conversation = start(
        system_prompt="Be terse.", max_tokens=4, sampler=lambda _: line
    )
    for question in (COUNT, "Go on.", "And on."):
        say(conversation, question)
    text = tokenizer.decode(fed)
    assert seen(conversation) == len(fed)
    assert text.count("<|endoftext|>") == text.count("Be terse.") == 1
    assert text.count("<|im_start|>") == text.count("<|im_end|>") + 1 == 7


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
    offset = seen(other)
    with pytest.raises(CacheStateError, match="not a whole saved prompt"):
        other.load(file)
    assert seen(other) == offset


def write_anew(file, arrays, texts):
    """Write a saved prompt as earlier versions did, without a checksum."""
    del texts["0.tova_mlx_sum"]
    mx.save_safetensors(str(file), arrays, texts)


@pytest.mark.parametrize(
    "chat",
    [
        "",
        "[",
        "[]",
        "3",
        '[3, ["a", "b", true]]',
        '[null, ["a"]]',
        "[null, 1]",
        "[null, 1, true]",
        '[null, ["abc"], false]',
        '[null, [["a", "b"]], false]',
    ],
)
def test_a_file_that_is_no_chat_changes_nothing(start, tmp_path, chat):
    conversation = start()
    say(conversation, QUESTION)
    offset, said = seen(conversation), list(conversation._turns)
    file = conversation.save(tmp_path / "chat")
    arrays, texts = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    name = next(n for n in texts if n.endswith("tova_mlx_chat"))
    assert json.loads(texts[name])[1][0][0] == QUESTION
    write_anew(file, arrays, texts | {name: chat})
    with pytest.raises(CacheStateError, match="not one of a chat"):
        conversation.load(file)
    assert (seen(conversation), conversation._turns) == (offset, said)


def test_a_file_of_the_last_exchange_only_goes_on(start, tmp_path):
    conversation, other = start(), start()
    say(conversation, COUNT)
    say(conversation, QUESTION)
    file = conversation.save(tmp_path / "chat")
    arrays, texts = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    name = next(n for n in texts if n.endswith("tova_mlx_chat"))
    old = json.dumps([None, conversation._turns[-1]])
    write_anew(file, arrays, texts | {name: old})
    other.load(file)
    assert other._turns == conversation._turns[-1:]
    assert say(other, "Why?") == say(conversation, "Why?")


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
    # 32 KiB of keys and values a token.
    tokens, _, size = turns[-1]
    mib = [f"{n / 2**20:,.1f} MiB" for n in (tokens * 2**15, tokens * 2**15 - size)]
    assert done.stderr.splitlines()[-1].startswith(f"saved: {mib[1]} of {mib[0]};")
    assert done.stderr.endswith(f"; 32 of {tokens:,} tokens are held per layer\n")


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
    assert "Error: nowhere.safetensors: no such file" in said
    assert "TOVACache" in said
    assert "/load FILE   go on" in said
    asked, loaded = totals(said)[1:]
    assert asked == loaded
    assert "Traceback" not in said


def test_a_conversation_is_found_under_the_name_it_was_saved_as(demo_path, tmp_path):
    lines = f"{QUESTION}\n/save talk\n/save ~/other\n/reset\n/load talk\n"
    lines += "/load ~/other\n/load talk.safetensors\n/save no/where\n/save ~\n"
    done = subprocess.run(
        [*PROGRAM, "--model", str(demo_path), "--max-tokens", "3"],
        input=lines,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # Where the demo model is, and the user is not.
        env=os.environ | {"HOME": str(tmp_path)},
    )
    said = done.stderr
    assert done.returncode == 0, said
    assert f"Saved to {tmp_path / 'talk.safetensors'}." in said
    assert f"Saved to {tmp_path / 'other.safetensors'}." in said
    assert len(re.findall(r"Loaded: \d+ tokens seen", said)) == 3
    assert "Error: no/where.safetensors: cannot save" in said
    assert len(set(totals(said))) == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_bytes_and_letters_of_any_kind_do_not_end_it(small_path, encoding, tmp_path):
    # Random weights say letters of all kinds.
    question = b"caf\xe9 \xed\xa0\x80 \xf0\x9f\x98\x80?\n"
    done = subprocess.run(
        [*PROGRAM, "--model", str(small_path), "--temp", "1", "--max-tokens", "300"],
        input=question * 3 + b"/save caf\xe9\n/stats\n",
        capture_output=True,
        cwd=tmp_path,
        env=os.environ | C_LOCALE | {"PYTHONIOENCODING": encoding},
    )
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, said
    assert len(totals(said)) == 3
    # A name that this locale has no bytes for.
    assert re.search(r"Error: caf\S+: cannot save", said)
    assert "Traceback" not in said
    assert len(done.stdout) > 1000


@pytest.mark.parametrize(
    "locale", [C_LOCALE, {"LC_ALL": "C.UTF-8"}], ids=["C", "UTF-8"]
)
def test_a_terminal_may_send_bytes_that_are_no_text(small_path, locale):
    chat = pexpect.spawn(
        PROGRAM[0],
        [*PROGRAM[1:], "--model", str(small_path), "--max-tokens", "20", "--temp", "1"],
        timeout=120,
        env=os.environ | locale,
        dimensions=(40, 120),
    )
    answered = rb"tokens seen, (\d+) held, cache [\d,]+ bytes"
    for _ in range(3):
        chat.sendline(b"caf\xe9 \xc3\xa9?")
        chat.expect(answered)
    chat.sendline(b"/exit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    assert b"Traceback" not in chat.before


def test_ctrl_c_ends_a_pipe(demo_path):
    chat = subprocess.Popen(
        [*PROGRAM, "--model", str(demo_path), "--max-tokens", "2000"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A job in the background of a shell inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    chat.stdin.write(f"{COUNT}\n{COUNT}\n".encode())
    chat.stdin.flush()
    assert chat.stdout.read(1)
    chat.send_signal(signal.SIGINT)
    _, said = chat.communicate(timeout=120)
    assert chat.returncode == 130
    assert said.decode().endswith("Interrupted.\n")
    assert "Traceback" not in said.decode()


@pytest.mark.parametrize("presses", [0, 1, 2])
def test_ctrl_c_raises_once_and_then_no_more(presses):
    # What the first exception puts in order must not be broken off by a second.
    ctrl_c = _CtrlC(installed=True)
    for _ in range(2):
        ctrl_c.raise_at(presses)
        assert not ctrl_c.pressed()
        for n in range(1, 6):
            with pytest.raises(KeyboardInterrupt) if n == presses else nullcontext():
                ctrl_c()
            assert ctrl_c.pressed()


def test_ctrl_c_never_ends_a_terminal_session(demo_path, tmp_path):
    chat = pexpect.spawn(
        PROGRAM[0],
        [*PROGRAM[1:], "--model", str(demo_path), "--prefill-step-size", "16"],
        encoding="utf-8",
        timeout=120,
        dimensions=(40, 120),
        cwd=str(tmp_path),
    )
    ready, answered = "›", r"(\d+) tokens seen, (\d+) held, cache [\d,]+ bytes"
    stopped = "Stopped before the question was read to its end; the conversation is as"

    def ask(question):
        """Wait until it is read: Ctrl-C before that would only clear the line."""
        chat.sendline(f"{question} Why, tell me?")
        chat.expect(r"tell me\?")
        time.sleep(0.3)

    def press(times):
        # A signal: a terminal drops what it has not shown yet with every Ctrl-C.
        for _ in range(times):
            chat.kill(signal.SIGINT)
            time.sleep(0.01)

    def be_at_prompt():
        # Readline sees a signal that comes as the prompt does with the next line only,
        # which is lost then.
        chat.sendline("")
        time.sleep(0.3)
        chat.sendline("/help")
        chat.expect("Ctrl-C stops")
        chat.expect(ready)
        time.sleep(0.3)

    chat.expect("commands.*/help")
    chat.expect(ready)
    chat.sendline(QUESTION)
    chat.expect("Paris")
    chat.expect(answered)
    seen = chat.match.group(1)
    be_at_prompt()
    # Once, twice, and more often: at the next chunk, or within one.
    for presses in (1, 2, 3, 7):
        ask("why " * 350)
        press(presses)
        chat.expect(stopped)
        be_at_prompt()
        chat.sendline("/save talk")
        chat.expect("Saved to")
        chat.sendline("/load talk")
        chat.expect(f"Loaded: {seen} tokens seen")
        be_at_prompt()
    for presses in (1, 2, 5):
        ask("Tell me a long story about a whale.")
        chat.expect("whale")
        press(presses)
        # The first one waits for the end of a step, the second does not.
        chat.expect([r"\[stopped\]", "Stopped"] if presses > 1 else r"\[stopped\]")
        chat.expect(answered)
        be_at_prompt()
    for _ in range(3):
        press(1)
        chat.expect("Type /exit or Ctrl-D to leave")
        be_at_prompt()
    chat.sendline(QUESTION)
    chat.expect(answered)
    be_at_prompt()
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


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
    chat.expect("The ")
    chat.sendintr()
    chat.expect(r"\[stopped\]")
    chat.expect(answered)
    seen = chat.match.group(1)
    chat.expect(ready)
    # Between readline's prompt and its wait, CPython itself loses one.
    words, late = "Type /exit or Ctrl-D to leave", pexpect.TIMEOUT
    for _ in range(3):
        chat.sendintr()
        if chat.expect([words, late], timeout=20) == 0:
            break
    else:
        pytest.fail("Ctrl-C says nothing")
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
