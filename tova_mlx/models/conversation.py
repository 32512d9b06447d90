"""A conversation with one model in bounded memory, without a terminal.

Each turn feeds the cache only what it has not seen, so that a turn of a conversation of
any length costs the same. What was said is remembered as text, for where a cache cannot
go on: then all of it is read again.
"""

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache

from ..errors import CacheStateError, PromptError, TovaError
from ..hooks.layers import leaves, seen
from ..hooks.template import beginning_of, rendered
from ..hooks.trimming import trim_prompt_cache
from .conversion import archive_as_converted, pin_tokens
from .saved import load_prompt_cache, save_prompt_cache
from .vocabulary import check_tokens

NOT_READ = (
    "Stopped before the question was read to its end; the conversation is as before it."
)
# Stands for an answer in what a template makes of it.
_ANSWER = "theanswer"


class Turn(NamedTuple):
    """A question and what was answered; ended: whether the model ended it."""

    question: str
    answer: str
    ended: bool

    @classmethod
    def of(cls, given: Any) -> "Turn":
        """Raises TypeError, ValueError for what JSON did not make of one."""
        if not isinstance(given, list):
            raise TypeError
        question, answer, ended = given
        return cls(_well_formed(str(question)), _well_formed(str(answer)), bool(ended))


class Recalled(NamedTuple):
    """Neighbours that were evicted and came back: positions from start to stop.

    layers: of how many the window holds one of them, at most.
    """

    start: int
    stop: int
    layers: int
    text: str


class Conversation:
    """Turns of one conversation over one list of caches.

    While a question is read there are two lists: until the first piece of the answer
    the conversation is as it was before the question, whatever happens.

    Args:
        model: from `mlx_lm.load`, converted (`tova_mlx.convert`).
        tokenizer: its tokenizer.
        system_prompt: text of a system message at the start.
        pin_system: whether all that comes before the first question is kept, whatever
            the policy; at most half of what a layer keeps.
        generate: options of every turn, as for `mlx_lm.stream_generate`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        system_prompt: str | None = None,
        pin_system: bool = True,
        **generate: Any,
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, generate
        if system_prompt is not None:
            system_prompt = _well_formed(system_prompt)
        self.system_prompt, self.pin_system = system_prompt, pin_system
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._turns: list[Turn] = []
        # All tokens that the caches have seen.
        self._tokens: list[int] = []
        # Whether caches have yet to read what was said.
        self._unread = False
        self.caches = self._new_caches()

    @property
    def begun(self) -> bool:
        """Whether there was a question."""
        return bool(self._turns)

    @property
    def is_unread(self) -> bool:
        """Whether all that was said is read again with the next question."""
        return self._unread

    def ask(
        self,
        text: str,
        stop: Callable[[], bool] = lambda: False,
        reached: Callable[[int, int], Any] = lambda done, total: None,
    ) -> Iterator[Any]:
        """The answer to `text`, piece by piece: what `stream_generate` yields.

        `reached` is called with the tokens read of the question and all that there are.

        `stop` is asked between steps: if it says True the answer ends there. So it does
        if the caller goes away; what was answered so far is part of the conversation.

        Raises CacheStateError if `stop` says True before the question was read to its
        end, or if a step of the answer fails and cannot be taken back: then all that
        was said is read again with the next question.
        """
        text = _well_formed(text)
        tokens, caches = self._next_turn(text)
        check_tokens(self.model, tokens)
        before = self._tokens[: _seen_by_all(caches)]
        answer: str = ""
        seen: list[Any] = []

        def between_chunks(done: int, total: int) -> None:
            reached(done, total)
            if stop() and done < total:
                raise _Stopped

        pieces: Any = stream_generate(
            self.model,
            self.tokenizer,
            tokens,
            prompt_cache=caches,
            prompt_progress_callback=between_chunks,
            **self.options,
        )
        try:
            with closing(pieces):
                for piece in pieces:
                    if not seen:
                        self._turns.append(Turn(text, "", False))
                        self._tokens = [*before, *tokens]
                    answer += piece.text
                    # The caches before go, so that the next write is in place.
                    self.caches, self._unread = caches, False
                    self._turns[-1] = Turn(text, answer, piece.finish_reason == "stop")
                    seen = _offsets(caches)
                    self._tokens.append(int(piece.token))
                    yield piece
                    if stop():
                        break
        except _Stopped:
            raise CacheStateError(NOT_READ) from None
        except GeneratorExit:
            # Between two steps.
            raise
        except BaseException as error:
            if seen and not self._go_back(seen):
                # Some layers may be a token ahead of others.
                self.caches, self._unread = self._new_caches(), True
                if isinstance(error, Exception):
                    raise CacheStateError(
                        f"The answer broke off within a step ({error}), which cannot "
                        "be taken back. Ask again: all that was said is read again."
                    ) from error
            raise

    def save(self, path: str | Path) -> Path:
        """Write caches and what was said to a file and return its path.

        Raises CacheStateError.
        """
        said = [self.system_prompt, self._turns, self._unread]
        read = self._tokens[: _seen_by_all(self.caches)]
        metadata = {"tova_mlx_chat": json.dumps(said)}
        metadata["tova_mlx_tokens"] = json.dumps(read)
        return save_prompt_cache(path, self.caches, model=self.model, metadata=metadata)

    def load(self, path: str | Path) -> None:
        """Go on where `save` was called.

        Raises CacheStateError, OptionError and changes nothing.
        """
        caches, metadata = load_prompt_cache(path, model=self.model)
        try:
            system_prompt, turns, *unread = json.loads(metadata["tova_mlx_chat"])
            if not isinstance(system_prompt, str | None):
                raise TypeError
            if not unread:
                # Of a version that remembered the last exchange.
                turns = [] if turns is None else [turns]
            turns = [Turn.of(turn) for turn in turns]
            # A version before did not note them.
            tokens = json.loads(metadata.get("tova_mlx_tokens", "[]"))
            if not isinstance(tokens, list) or not all(
                type(token) is int and token >= 0 for token in tokens
            ):
                raise TypeError
        except (LookupError, ValueError, TypeError, RecursionError) as error:
            raise CacheStateError(
                f"{path}: a saved prompt, but not one of a chat. Use a file that /save "
                "made."
            ) from error
        archive_as_converted(self.model, caches)
        self.caches, self.system_prompt, self._turns = caches, system_prompt, turns
        self._unread, self._tokens = unread == [True], tokens

    def recalled(self) -> list["Recalled"]:
        """What the last token attended to most of what was evicted, by position.

        Empty without recall; the text is not known of a file of an earlier version.
        """
        layers: dict[int, int] = {}
        for cache in leaves(self.caches):
            for position in getattr(cache, "recalled_positions", []):
                layers[position] = layers.get(position, 0) + 1
        found: list[Recalled] = []
        for position in sorted(layers):
            if found and found[-1].stop == position:
                most = max(found[-1].layers, layers[position])
                found[-1] = found[-1]._replace(stop=position + 1, layers=most)
            else:
                found.append(Recalled(position, position + 1, layers[position], ""))
        return [
            r._replace(text=self.tokenizer.decode(self._tokens[r.start : r.stop]))
            for r in found
        ]

    @property
    def system_tokens(self) -> int:
        """How many tokens come before the text of the first question."""
        if self.tokenizer.chat_template is None:
            return 0
        try:
            begins = beginning_of(
                lambda text: self._encode(
                    self._render([{"role": "user", "content": text}])
                )
            )
        except PromptError:
            # Said when there is a question.
            return 0
        return len(begins)

    @property
    def pinned(self) -> int:
        """How many tokens at the beginning are kept for good."""
        rules = [getattr(c, "rule", None) for c in leaves(self.caches)]
        return max((rule.pinned for rule in rules if rule is not None), default=0)

    def _new_caches(self) -> list[Any]:
        caches = make_prompt_cache(self.model)
        if self.pin_system:
            pin_tokens(caches, self.system_tokens)
        return caches

    def _go_back(self, seen: list[Any]) -> bool:
        """Take back what came after `seen`; whether the layers are together then."""
        if None in seen:
            # A state that does not say how many tokens are in it.
            return False
        ahead = _ahead(self.caches, seen)
        if any(ahead):
            trim_prompt_cache(self.caches, max(ahead))
            ahead = _ahead(self.caches, seen)
        try:
            # Raises for a layer that has not attended to what it was given.
            _ = [c.state for c in self.caches]
        except TovaError:
            return False
        return len(ahead) <= 1

    def _next_turn(self, text: str) -> tuple[list[int], list[Any]]:
        """The tokens of the next question, and caches that have seen all before."""
        if not text.strip():
            raise PromptError("The question is empty. Give at least one word.")
        if not self._turns or self._unread:
            return self._encode(self._whole(text)), copy.deepcopy(self.caches)
        if self.tokenizer.chat_template is None:
            return self._encode(text), copy.deepcopy(self.caches)
        last = self._turns[-1]
        rest = self._after_answer(last.question, text)
        if rest is None:
            # A template that rewrites answers.
            return self._encode(self._whole(text)), self._new_caches()
        tokens, caches = self._encode(rest), copy.deepcopy(self.caches)
        if last.ended and tokens[:1] and tokens[0] in self.tokenizer.eos_token_ids:
            tokens = tokens[1:]
        return tokens, caches

    def _whole(self, text: str) -> str:
        """All that was said, and a question."""
        if self.tokenizer.chat_template is None:
            return "".join(t.question + t.answer for t in self._turns) + text
        pairs = [
            [
                {"role": "user", "content": turn.question},
                {"role": "assistant", "content": turn.answer},
            ]
            for turn in self._turns
        ]
        new = {"role": "user", "content": text}
        return self._render([*itertools.chain(*pairs), new])

    def _after_answer(self, question: str, text: str) -> str | None:
        """What the template puts after an answer: its end, and the next question.

        It does not depend on the answer, which a template may trim, or shorten by its
        thoughts, once it is not the last. None if the answer is not to be found.
        """
        system = (self.system_prompt or "").strip()
        mark = _ANSWER
        while mark in f"{question} {text} {system}":
            mark += "s"
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": mark},
            {"role": "user", "content": text},
        ]
        rest = _only_after(mark, self._render(messages))
        if rest is not None and system and system in rest:
            # A template that moves the system message to the newest question.
            rest = _only_after(mark, self._render(messages, system=False))
        return rest

    def _render(self, messages: list[dict[str, str]], *, system: bool = True) -> str:
        if system and self.system_prompt is not None:
            first = {"role": "system", "content": self.system_prompt}
            messages = [first, *messages]
        return rendered(self.tokenizer, messages, tokenize=False)

    def _encode(self, text: str) -> list[int]:
        first = not self._turns or self._unread
        special = first and self.tokenizer.chat_template is None
        return list(self.tokenizer.encode(text, add_special_tokens=special))


class _Stopped(Exception):
    """Asked to stop between two chunks of a question."""


def _well_formed(text: str) -> str:
    """With U+FFFD for halves of surrogate pairs, which no tokenizer takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _only_after(mark: str, text: str) -> str | None:
    """What follows `mark`; None unless it is there once."""
    _, *rest = text.split(mark)
    return rest[0] if len(rest) == 1 else None


def _seen_by_all(caches: list[Any]) -> int:
    """Tokens that each layer has seen that says so."""
    return min((n for n in _offsets(caches) if n is not None), default=0)


def _offsets(caches: list[Any]) -> list[int | None]:
    """Tokens seen by each layer; None for one that does not say."""
    offsets = [seen(c) for c in leaves(caches)]
    return [o if isinstance(o, int) else None for o in offsets]


def _ahead(caches: list[Any], seen: list[Any]) -> set[int]:
    """By how many tokens the layers in use have seen more than then."""
    pairs = zip(_offsets(caches), seen, strict=True)
    return {now - then for now, then in pairs if now and then}
