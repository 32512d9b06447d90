"""What the server does about its clients, with answers that are not generated."""

import itertools
import json
import socket
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext, Response

from tova_mlx.cli import main
from tova_mlx.cli.address import check_address
from tova_mlx.errors import OptionError, RequestError
from tova_mlx.hooks import handler

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from abusers import exchange, leave
from server_abuse import HOST, TEXT, Abuse, completion, request, user

DEFAULTS = SimpleNamespace(
    **{"num_draft_tokens": 3, "max_tokens": 9, "temp": 0.0, "top_p": 1.0, "top_k": 0},
    **{"min_p": 0.0, "allowed_origins": "*"},
)


class Answers:
    """Stands for mlx-lm's generation: what each answer consists of, without a model."""

    cli_args = DEFAULTS

    def __init__(self, parts):
        self.parts = parts
        self.contexts = []
        self.begin = threading.Event()
        self.begin.set()

    def generate(self, request, args, progress_callback):
        machine = TextStateMachine()
        context = GenerationContext(False, False, None, machine, "normal", [1])
        self.contexts.append(context)
        self.begin.wait()
        return context, self.parts(progress_callback)


def text(words, finish_reason=None):
    return Response(words, 1, 0.0, finish_reason, ())


@contextmanager
def listening(parts, monkeypatch, seconds=60):
    """A listener on a free port, and what it makes its answers of."""
    monkeypatch.setattr(handler, "SECONDS", seconds)
    answers = Answers(parts)
    handle = partial(handler.request_handler(16), answers, system_fingerprint="")
    with handler.Listener((HOST, 0), handle) as listener:
        threading.Thread(target=listener.serve_forever, args=(0.01,)).start()
        try:
            yield listener.server_port, answers
        finally:
            listener.shutdown()


def comes_true(condition):
    for _ in range(1000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def without_end(progress):
    for _ in itertools.count():
        yield text("x" * 20_000)


def read_without_end(progress):
    for i in itertools.count():
        time.sleep(0.001)
        progress(i, i + 1)
    yield


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("parts", [without_end, read_without_end])
def test_an_answer_ends_when_its_client_leaves(parts, stream, monkeypatch):
    asked = completion("200", stream=stream).sent
    with listening(parts, monkeypatch) as (port, answers):
        with socket.create_connection((HOST, port)) as client:
            client.sendall(asked)
            assert comes_true(lambda: answers.contexts)
            time.sleep(0.05)
            assert not answers.contexts[0]._should_stop
        assert comes_true(lambda: answers.contexts[0]._should_stop)


def test_a_stream_ends_whose_client_left_before_it_began(monkeypatch):
    with listening(without_end, monkeypatch) as (port, answers):
        answers.begin.clear()
        leave(port, {"messages": [user("Why?")], "stream": True}, 0.05)
        assert comes_true(lambda: answers.contexts)
        answers.begin.set()
        assert comes_true(lambda: answers.contexts[0]._should_stop)


def test_an_answer_ends_when_its_client_stops_reading(monkeypatch):
    with (
        listening(without_end, monkeypatch, 0.2) as (port, answers),
        socket.create_connection((HOST, port)) as client,
    ):
        client.sendall(completion("200", stream=True).sent)
        assert comes_true(lambda: answers.contexts and answers.contexts[0]._should_stop)


@pytest.mark.parametrize(
    "sent", [b"", b"POST", request(TEXT, b"", "Content-Length: 9")]
)
def test_a_client_that_sends_no_more_is_let_go(sent, monkeypatch):
    with listening(without_end, monkeypatch, 0.2) as (port, answers):
        assert exchange(port, Abuse(sent, ()), 10) == ("no answer", b"")
        assert not answers.contexts


def fails_at_once(progress):
    raise RequestError("planted")
    yield


def fails_later(progress):
    yield text("So ")
    raise RequestError("planted")


@pytest.mark.parametrize("parts", [fails_at_once, fails_later])
def test_a_failure_is_said_to_the_client(parts, monkeypatch):
    with listening(parts, monkeypatch) as (port, answers):
        status, got = exchange(port, completion("500"), 10)
        assert status == "500"
        assert got.count(b"HTTP/1.0") == 1
        assert json.loads(got.split(b"\r\n\r\n")[1]) == {"error": "planted"}
        status, got = exchange(port, completion("200", stream=True), 10)
        assert status == "200"
        last = got.decode().strip().split("\n")[-1]
        assert json.loads(last.removeprefix("data: ")) == {
            "error": {"message": "planted"}
        }
        assert all(context._should_stop for context in answers.contexts)


def ends(progress):
    yield text("So", "stop")


@pytest.mark.parametrize("options", [None, {}, {"include_usage": True}])
def test_a_stream_ends_as_it_should_whatever_its_options(options, monkeypatch):
    with listening(ends, monkeypatch) as (port, _):
        asked = completion("200", stream=True, stream_options=options)
        _, got = exchange(port, asked, 10)
    assert got.endswith(b"data: [DONE]\n\n")
    assert (b'"usage"' in got) == bool(options)


def test_a_body_at_the_limit_is_read_and_one_above_is_not(monkeypatch):
    monkeypatch.setattr(handler, "MOST_BYTES", 100)

    def body(n):
        start = b'{"prompt": "'
        return start + b"a" * (n - len(start) - 2) + b'"}'

    with listening(ends, monkeypatch) as (port, answers):
        assert exchange(port, Abuse(request(TEXT, body(100)), ()), 10)[0] == "200"
        assert exchange(port, Abuse(request(TEXT, body(101)), ()), 10)[0] == "413"
        assert len(answers.contexts) == 1


def test_an_error_of_a_connection_is_logged_in_one_line(monkeypatch, caplog, capsys):
    monkeypatch.setattr(handler.server.APIHandler, "do_GET", lambda self: 1 / 0)
    with listening(without_end, monkeypatch) as (port, _):
        get = Abuse(request("/health", b"", method="GET"), ())
        assert exchange(port, get, 10)[0] == "no answer"
    assert [r.message for r in caplog.records] == [
        "127.0.0.1: ZeroDivisionError: division by zero"
    ]
    assert "Traceback" not in caplog.text + capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "warned"),
    [("127.0.0.1", False), ("localhost", False), ("0.0.0.0", True)],
)
def test_an_address_that_others_reach_is_warned_of(host, warned, capsys):
    check_address(host, 0)
    said = capsys.readouterr().err
    assert said.startswith(f"Warning: --host {host} lets") == warned
    assert said.count("\n") == warned


def test_an_address_of_another_machine_cannot_be_listened_at():
    with pytest.raises(OptionError, match="cannot listen there"):
        check_address("192.0.2.1", 0)


def test_a_port_that_is_taken_is_said_before_a_model_is_looked_for():
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        arguments = ["serve", "--port", port, "--model", "./nothing"]
        done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: --host 127.0.0.1 --port {port}: cannot")
    assert done.output.count("\n") == 1
