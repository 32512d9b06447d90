"""Clients of a server that send what they should not, leave, or hardly read.

`scripts/load_server.py` has them beside its own; the tests of the server use them too.
"""

import json
import random
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from typing import Any

from server_abuse import ABUSES, CHAT, HOST, Abuse, chat, request, user

# Seconds that a server may say nothing: a long prompt is read in the midst.
WAIT = 900.0


def exchange(port: int, abuse: Abuse, wait: float = WAIT) -> tuple[str, bytes]:
    """What a server answers: a status or what it did instead of one; and all of it.

    wait: seconds without anything until a server counts as silent.
    """
    received = b""
    with socket.create_connection((HOST, port), wait) as client:
        try:
            client.sendall(abuse.sent)
            if abuse.ends:
                client.shutdown(socket.SHUT_WR)
        except TimeoutError:
            return "silent", b""
        except OSError:
            # It may have said why before it hung up.
            pass
        try:
            while some := client.recv(1 << 16):
                received += some
        except TimeoutError:
            return "silent", received
        except OSError:
            if not received:
                return "reset", b""
    if not received:
        return "no answer", b""
    words = received.split(b"\r\n", 1)[0].split()
    return (words[1].decode() if words[0] == b"HTTP/1.0" else "no status"), received


def leave(port: int, body: dict[str, Any], after: float) -> bytes:
    """Ask, read what comes for some seconds, and reset the connection; what came."""
    until, received = time.monotonic() + after, b""
    with socket.create_connection((HOST, port), 60) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(request(CHAT, json.dumps(body).encode()))
        while (left := until - time.monotonic()) > 0:
            client.settimeout(left)
            try:
                some = client.recv(1 << 16)
            except OSError:
                break
            if not some:
                break
            received += some
    return received


def read_slowly(port: int, body: dict[str, Any], seconds: float) -> bytes:
    """Ask, and read one byte a second for some seconds; what came."""
    received = b""
    with socket.socket() as client:
        # The least that the system has, or all would fit.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        client.settimeout(seconds)
        client.connect((HOST, port))
        client.sendall(request(CHAT, json.dumps(body).encode()))
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            try:
                some = client.recv(1)
            except OSError:
                break
            if not some:
                break
            received += some
            time.sleep(1)
    return received


class Abusers:
    """Threads that abuse a server until they are told to end; what they got.

    context: words of a prompt that is too long, 0 for none. got: statuses by kind of
    request; texts: all that came.
    """

    def __init__(self, port: int, context: int):
        self.port, self.over = port, threading.Event()
        self.got: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.texts: list[str] = []
        endless = {"messages": [user("Count!")], "max_tokens": 10**6, "temperature": 0}
        streamed = endless | {"stream": True}
        long = {"messages": [user("word " * context)], "max_tokens": 4}
        shorter = {"messages": [user("word " * (context // 10))], "max_tokens": 4}
        jobs = [
            (self._send_all,),
            (self._leave, "leaves, not streamed", endless),
            (self._leave, "leaves, streamed", streamed),
            (self._read, "reads a byte a second", streamed | {"max_tokens": 32}),
        ]
        if context:
            jobs.append((self._leave, "leaves a long prompt", shorter))
            jobs.append((self._send_long, long))
        self._threads = [threading.Thread(target=f, args=rest) for f, *rest in jobs]
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join()

    def _note(self, kind: str, status: str, text: bytes) -> None:
        self.got[kind][status] += 1
        self.texts.append(text.decode(errors="replace"))

    def _send_all(self) -> None:
        # All of them at least once.
        while True:
            for kind, abuse in ABUSES.items():
                self._note(kind, *exchange(self.port, abuse))
            if self.over.wait(1):
                return

    def _leave(self, kind: str, body: dict[str, Any]) -> None:
        draw = random.Random(kind)
        while not self.over.wait(4):
            self._note(kind, "left", leave(self.port, body, 4 * draw.random()))

    def _read(self, kind: str, body: dict[str, Any]) -> None:
        while not self.over.is_set():
            self._note(kind, "left", read_slowly(self.port, body, 20))

    def _send_long(self, body: dict[str, Any]) -> None:
        got = exchange(self.port, chat("200", **body))
        self._note("prompt above the context", *got)


def wrong_statuses(got: dict[str, Counter[str]]) -> dict[str, list[str]]:
    """Statuses by kind that are not right for it."""
    right = {kind: abuse.right for kind, abuse in ABUSES.items()}
    found = {
        kind: sorted(set(statuses) - set(right.get(kind, ("left", "200"))))
        for kind, statuses in got.items()
    }
    return {kind: statuses for kind, statuses in found.items() if statuses}
