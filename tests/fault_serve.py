"""Signals to a server, and Ctrl-C in a chat that has a terminal."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable

from fault_ends import SIGINT, SIGTERM, after, send
from faults import Done, Place

# A reply of so many tokens takes longer than the signal.
_BODY = {"messages": [{"role": "user", "content": "Tell"}], "max_tokens": 20_000}
_WORDS = "-m tova_mlx serve --model {model} --max-kv-size 64 --port "


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _listens(port: int) -> Callable[[subprocess.Popen[bytes]], None]:
    """Wait until a server listens, or has ended."""

    def wait(process: subprocess.Popen[bytes]) -> None:
        for _ in range(600):
            if process.poll() is not None:
                return
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                time.sleep(0.1)

    return wait


def _answers(port: int) -> Callable[[subprocess.Popen[bytes]], None]:
    """Wait until a server is in the middle of an answer."""

    def wait(process: subprocess.Popen[bytes]) -> None:
        _listens(port)(process)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps({**_BODY, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        answer = urllib.request.urlopen(request, timeout=60)
        answer.readline()
        _open_answers.append(answer)

    return wait


# Held, so that a client is there when the signal comes.
_open_answers: list[object] = []


def _ended(done: Done, codes: tuple[int, ...]) -> list[str]:
    if done.has_traceback:
        return [f"a traceback: {done.last}"]
    return [] if done.code in codes else [f"exit {done.code}: {done.last}"]


def _loading(number: int) -> Callable[[Place], list[str]]:
    # By the signal itself before our handlers are there: 130 or 143 for a shell.
    codes = (130, -number)

    def attempt(place: Place) -> list[str]:
        problems = []
        for seconds in (0.7, 1.4, 2.1):
            words = f"{_WORDS}{_free_port()}"
            # Quick machines may listen already.
            done = send(place, words, number, after(seconds))
            problems += _ended(done, (*codes, 0))
        return problems

    return attempt


def _running(
    number: int, wait: Callable[[int], Callable[[subprocess.Popen[bytes]], None]]
) -> Callable[[Place], list[str]]:
    def attempt(place: Place) -> list[str]:
        port = _free_port()
        return _ended(send(place, f"{_WORDS}{port}", number, wait(port)), (0,))

    return attempt


SERVING: dict[str, Callable[[Place], list[str]]] = {
    "Ctrl-C while loading": _loading(SIGINT),
    "SIGTERM while loading": _loading(SIGTERM),
    "Ctrl-C while listening": _running(SIGINT, _listens),
    "SIGTERM while listening": _running(SIGTERM, _listens),
    "Ctrl-C during an answer": _running(SIGINT, _answers),
    "SIGTERM during an answer": _running(SIGTERM, _answers),
}


def _at_prompt(place: Place) -> list[str]:
    """Ctrl-C at the prompt and in an answer never ends a chat, and /exit does."""
    import pexpect

    words = "-m tova_mlx chat --model {model} --max-tokens 3000 --max-kv-size 64"
    chat = pexpect.spawn(
        sys.executable,
        place.fill(words),
        encoding="utf-8",
        codec_errors="replace",
        timeout=60,
        dimensions=(40, 120),
        env=place.environment(),
        cwd=str(place.root),
    )
    try:
        chat.expect("commands.*/help")
        chat.expect("›")
        for _ in range(3):
            time.sleep(0.5)
            chat.sendintr()
            # Between readline's prompt and its wait, CPython itself loses one.
            if chat.expect(["Ctrl-D to leave", pexpect.TIMEOUT], timeout=10):
                continue
            chat.expect("›")
        chat.sendline("Tell me")
        time.sleep(1.5)
        chat.sendintr()
        chat.expect(r"tokens seen|Stopped")
        chat.expect("›")
        time.sleep(0.5)
        chat.sendline("/exit")
        chat.expect(pexpect.EOF)
    except (pexpect.TIMEOUT, pexpect.EOF) as error:
        return [f"the terminal said {str(chat.before)[-200:]!r} ({type(error)})"]
    finally:
        chat.close()
    said = str(chat.before)
    return _ended(Done(chat.exitstatus or 0, said, ""), (0,))


TERMINAL: dict[str, Callable[[Place], list[str]]] = {
    "Ctrl-C at the prompt and in an answer": _at_prompt
}
