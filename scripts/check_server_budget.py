"""A server with a budget in bytes: what its process takes while many clients ask.

    python scripts/check_server_budget.py [--budget 64MB] [--clients 8] [--rounds 6]

Starts `tova-mlx serve --max-kv-size BUDGET` on the demo model. Every client has a
conversation of its own whose turns are longer than the limit, so that caches and stored
prompts fill up. Printed: the most bytes that all arrays of all caches had at a moment,
as the server counts them every second step, copies included; resident bytes by round,
and how far they rose above those after one answer to one client. Ends with 1 if the
caches had more than the budget. The last line is JSON.
"""

import argparse
import json
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import EXCERPT, finish, provenance, resident

from tova_mlx.models.budget import parse_size
from tova_mlx.models.demo import demo_model_path

TEXT = EXCERPT.read_text(encoding="utf-8")
# The server, which writes what its caches have into files as it attends.
SERVER = """
import gc, itertools, sys
from pathlib import Path

from tova_mlx.cli import main
from tova_mlx.hooks.blas import load_openblas

load_openblas()

from tova_mlx.caches.batch import BatchPolicyKVCache
from tova_mlx.caches.layer import PolicyKVCache
from tova_mlx.storage.entries import arrays_of
from tova_mlx.storage.slots import Slots
from tova_mlx.storage.stack import Stack

# Attentions between two counts: two steps or so of the demo model.
EVERY = 61

def count():
    there = {}
    for slots in [o for o in gc.get_objects() if type(o) in (Slots, Stack)]:
        try:
            arrays = [a for e in slots.arrays for a in arrays_of(e)]
            arrays += slots.journal.arrays if type(slots) is Slots else []
        except AttributeError:  # being made
            continue
        there |= {id(a): a.nbytes for a in arrays}
    return sum(there.values())

def watched(kind, path):
    theirs, calls, most = kind.attend, itertools.count(1), [0]

    def attend(self, *args, **how):
        output = theirs(self, *args, **how)
        # In the thread that computes: others must not let go of its arrays.
        if next(calls) % EVERY == 0:
            most[0] = max(most[0], count())
            path.write_text(str(most[0]))
        return output

    kind.attend = attend

place = Path(sys.argv.pop(1))
for kind in (PolicyKVCache, BatchPolicyKVCache):
    watched(kind, place.with_name(kind.__name__))
main()
"""
# Characters of a turn: some 400 tokens.
TURN = 1600


def ask(port: int, messages: list[dict[str, str]]) -> str:
    """One answer of a server, greedily."""
    body = {
        "model": "default_model",
        "messages": messages,
        "max_tokens": 16,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="64MB")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kv-bits")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    counted = Path(tempfile.mkdtemp()) / "bytes"
    command = [sys.executable, "-c", SERVER, str(counted), "serve", "--port", str(port)]
    command += ["--model", str(demo_model_path()), "--max-kv-size", args.budget]
    command += ["--prefill-step-size", "256", "--log-level", "ERROR"]
    command += ["--kv-bits", args.kv_bits] if args.kv_bits else []
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        for line in server.stderr:
            print(line.rstrip(), flush=True)
            if "tokens per layer" in line:
                said = line.strip()
                break
        threading.Thread(target=server.stderr.read, daemon=True).start()
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.1)
        talks: list[list[dict[str, str]]] = [[] for _ in range(args.clients)]

        def turn(client: int) -> None:
            talk = talks[client]
            start = (client * 5003 + len(talk) * 977) % (len(TEXT) - TURN)
            talk.append({"role": "user", "content": TEXT[start : start + TURN]})
            talk.append({"role": "assistant", "content": ask(port, talk)})

        turn(0)
        before = resident(server.pid)
        most, rounds = before, []
        for number in range(args.rounds):
            with ThreadPoolExecutor(args.clients) as pool:
                running = [pool.submit(turn, i) for i in range(args.clients)]
                while not all(f.done() for f in running):
                    most = max(most, resident(server.pid))
                    time.sleep(0.05)
                for future in running:
                    future.result()
            rounds.append(resident(server.pid))
            print(f"round {number + 1}: {rounds[-1] / 1e6:.0f} MB", flush=True)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    report = {
        "budget": args.budget,
        "said": said,
        "clients": args.clients,
        "cache_bytes_most": max(
            int(file.read_text()) for file in counted.parent.iterdir()
        ),
        "resident_before": before,
        "resident_most": most,
        "resident_by_round": rounds,
        **provenance(),
    }
    finish(report, args.out)
    budget = parse_size(args.budget)
    sys.exit(report["cache_bytes_most"] > budget.nbytes)


if __name__ == "__main__":
    main()
