"""Hostile files through the whole command line, each in a process of its own."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import test_prepare
from hostile import REFUSED, RIGHT, Kind, Outcome, mutated_bytes
from hostile_models import mutated_json
from hostile_rows import mutated_rows

PROGRAM = (sys.executable, "-m", "tova_mlx")
SIZE = ("--max-kv-size", "12")


def run(*arguments: str, said: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [*PROGRAM, *arguments], input=said, capture_output=True, text=True
    )


class Commands:
    def make(self, place: Path) -> None:
        self.place, self.model = place, place / "model"
        self.model.mkdir()
        gguf = place / "a.gguf"
        test_prepare.write_gguf(gguf, "llama")
        test_prepare.gguf_model.convert(gguf, self.model, np.float32)
        self.of_model = ("--model", str(self.model))
        self.text = place / "text.txt"
        self.text.write_text("hi hi 12\n" * 30, encoding="utf-8")
        self.talk, self.prompt = (place / f"{n}.safetensors" for n in ("a", "b"))
        self.out = place / "out"
        commands = [
            self.chat("/save"),
            self.cache(),
            self.perplexity(),
            self.generate(),
        ]
        for done in commands:
            assert done.returncode == 0, done.stderr
        files = (self.talk, self.prompt, self.text, self.out / "results.jsonl")
        self.whole = {path: path.read_bytes() for path in files}

    def chat(self, command: str) -> subprocess.CompletedProcess:
        said = f"{command} {self.talk}\nhi\n{command} {self.talk}\n"
        return run("chat", *self.of_model, *SIZE, "--max-tokens", "2", said=said)

    def cache(self) -> subprocess.CompletedProcess:
        how = ("--prompt", "hi 12", "--prompt-cache-file", str(self.prompt))
        return run("run", *SIZE, "cache_prompt", *self.of_model, *how)

    def go_on(self) -> subprocess.CompletedProcess:
        how = ("--prompt", "hi", "--prompt-cache-file", str(self.prompt))
        return run("run", *SIZE, "generate", *self.of_model, *how, "--max-tokens", "2")

    def generate(self) -> subprocess.CompletedProcess:
        how = ("--prompt-file", str(self.text), "--max-tokens", "2")
        return run("generate", *self.of_model, *SIZE, *how)

    def perplexity(self) -> subprocess.CompletedProcess:
        how = ("--tokens", "40", "--context", "20", "--out", str(self.out))
        how += ("--policy", "tova", *SIZE)
        return run("eval", "perplexity", str(self.text), *self.of_model, *how)

    def try_one(self, dice: random.Random) -> Outcome:
        for path, data in self.whole.items():
            path.write_bytes(data)
        name = dice.choice(["chat", "go_on", "generate", "perplexity", "model"])
        path = {
            "chat": self.talk,
            "go_on": self.prompt,
            "generate": self.text,
            "perplexity": self.out / "results.jsonl",
            "model": self.model / "tokenizer_config.json",
        }[name]
        before = path.read_bytes()
        if name == "perplexity":
            rows = [json.loads(line) for line in before.decode().splitlines()]
            how, data = mutated_rows(rows, before, dice)
        elif name == "model":
            how, text = mutated_json(json.loads(before), dice)
            data = text.encode()
        else:
            how, data = mutated_bytes(before, [self.whole[self.text]], dice)
        path.write_bytes(data)
        try:
            done = {
                "chat": lambda: self.chat("/load"),
                "go_on": self.go_on,
                "generate": self.generate,
                "perplexity": self.perplexity,
                "model": self.generate,
            }[name]()
        finally:
            path.write_bytes(before)
            shutil.rmtree(self.out / "losses", ignore_errors=True)
        return judged(f"{name}, {how}", done)


def judged(how: str, done: subprocess.CompletedProcess) -> Outcome:
    assert "Traceback" not in done.stderr, done.stderr
    errors = [s for s in done.stderr.splitlines() if s.startswith("Error")]
    if done.returncode == 0:
        # A chat says that it cannot load, and goes on.
        return Outcome(how, REFUSED if errors else RIGHT, "".join(errors[:1]))
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert len(errors) == 1, done.stderr
    return Outcome(how, REFUSED, errors[0])


def kinds() -> list[Kind]:
    commands = Commands()
    return [Kind("command line", commands.make, commands.try_one)]
