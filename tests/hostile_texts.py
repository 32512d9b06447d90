"""Texts, questions and saved conversations that somebody changed."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import test_prepare
from hostile import RIGHT, Kind, Outcome, mutated_bytes, refused
from hostile_models import mutated_json

from tova_mlx.cli import models
from tova_mlx.cli.texts import read_given
from tova_mlx.errors import TovaError
from tova_mlx.evaluation.lines import read_text
from tova_mlx.evaluation.scores import f1
from tova_mlx.evaluation.tasks import load_qasper, load_squality
from tova_mlx.models.conversation import Conversation
from tova_mlx.models.conversion import convert

BOM, LATIN = b"\xef\xbb\xbf", "é".encode("latin-1")
TEXTS = [
    b"",
    b" \n",
    b"\0",
    BOM,
    BOM + b"a",
    b"a\0b",
    LATIN,
    b"a\x1b[31mb",
    b"\xff\xfea\0",
    "é\u2028\u0301 \U0001f600 \ufffe".encode(),
    b"\xed\xa0\x80",
    b"\xf8\x88\x80\x80\x80",
    b"a" * 10**6,
]


class Texts:
    """Prompts, and the texts of evaluations."""

    def make(self, place: Path) -> None:
        self.path = place / "text.txt"
        excerpt = Path(__file__).parents[1] / "scripts" / "moby_dick_excerpt.txt"
        self.whole = excerpt.read_bytes()[:20_000]

    def try_one(self, dice: random.Random) -> Outcome:
        how, data = "a text", dice.choice(TEXTS)
        if dice.random() < 0.8:
            how, data = mutated_bytes(self.whole, [dice.choice(TEXTS) or b"a"], dice)
        self.path.write_bytes(data)
        try:
            if dice.random() < 0.5:
                got = read_given(None, self.path, "PROMPT", "prompt")
            else:
                # As Python reads text.
                data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
                got = read_text(self.path)
        except TovaError as error:
            return refused(how, error)
        assert got.encode() == data.removeprefix(BOM), "another text"
        return Outcome(how, RIGHT)


SQUALITY = {
    "document": "A fox.",
    "questions": [
        {"question_text": "Who?", "responses": [{"response_text": "A fox."}] * 2},
        {"question_text": "Why?", "responses": [{"response_text": "Hunger."}]},
    ],
}
QASPER = {
    "input": "We count sheep.",
    "instructions": ["What?", "How?"],
    "outputs": ["sheep", ["slowly", "well"]],
    "evaluation": "f1",
}


class Questions:
    """SQuALITY's and QASPER's lines of JSON."""

    def make(self, place: Path) -> None:
        self.path = place / "lines.jsonl"

    def try_one(self, dice: random.Random) -> Outcome:
        load, line = dice.choice([(load_squality, SQUALITY), (load_qasper, QASPER)])
        how, text = mutated_json(json.loads(json.dumps(line)), dice)
        data = f"{json.dumps(line)}\n{text}\n".encode("utf-8", "surrogatepass")
        if dice.random() < 0.4:
            how, data = mutated_bytes(data, [data], dice)
        self.path.write_bytes(data)
        try:
            found = load(str(self.path), 9)
        except TovaError as error:
            return refused(how, error)
        for example in found:
            said = (example.document, example.question, *example.references)
            assert all(isinstance(text, str) for text in said)
            assert 0 <= f1("a fox", example.references) <= 1
        return Outcome(how, RIGHT)


class Talks:
    """Conversations that /save wrote, what was said changed and the checksum gone."""

    def make(self, place: Path) -> None:
        gguf, made = place / "a.gguf", place / "model"
        made.mkdir()
        test_prepare.write_gguf(gguf, "llama")
        test_prepare.gguf_model.convert(gguf, made, np.float32)
        model, self.tokenizer, _ = models.load(str(made))
        convert(model, 12, policy="fade")
        self.model, self.path = model, place / "talk.safetensors"
        talk = self._new()
        list(talk.ask("hi hi"))
        talk.save(self.path)
        self.whole, self.said = self.path.read_bytes(), talk._turns
        self.tokens = talk._tokens
        named: Any = mx.load(str(self.path), return_metadata=True)
        self.arrays, texts = named
        mx.eval(self.arrays)
        self.texts = {n: t for n, t in texts.items() if n != "0.tova_mlx_sum"}

    def _new(self) -> Conversation:
        return Conversation(self.model, self.tokenizer, max_tokens=2)

    def try_one(self, dice: random.Random) -> Outcome:
        whole = dice.random() < 0.3
        if whole:
            how, data = mutated_bytes(self.whole, [self.whole], dice)
            self.path.write_bytes(data)
        else:
            texts = dict(self.texts)
            name = dice.choice(["0.tova_mlx_chat", "0.tova_mlx_tokens"])
            how, texts[name] = mutated_json(json.loads(texts[name]), dice)
            if dice.random() < 0.1:
                del texts[name]
            try:
                mx.save_safetensors(str(self.path), self.arrays, texts)
            except (ValueError, RuntimeError, UnicodeError):
                return self.try_one(dice)
        talk = self._new()
        before = talk.caches
        try:
            talk.load(self.path)
        except TovaError as error:
            assert talk.caches is before
            return refused(how, error)
        if whole:
            assert (talk._turns, talk._tokens) == (self.said, self.tokens)
        try:
            for _ in talk.ask("12 hi"):
                assert all(isinstance(r.text, str) for r in talk.recalled())
            talk.save(self.path)
        except TovaError as error:
            return refused(how, error)
        return Outcome(how, RIGHT)


def kinds() -> list[Kind]:
    texts, questions, talks = Texts(), Questions(), Talks()
    return [
        Kind("text", texts.make, texts.try_one),
        Kind("questions of a task", questions.make, questions.try_one),
        Kind("saved chat", talks.make, talks.try_one),
    ]
