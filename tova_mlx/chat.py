"""A conversation with one model in bounded memory, without a terminal.

Each turn feeds the cache only what it has not seen. What is remembered beside the
cache is the last exchange, so that a conversation of any length costs the same.
"""

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.models.cache import make_prompt_cache

from .errors import CacheStateError, PromptError
from .saved import load_prompt_cache, save_prompt_cache


class Conversation:
    """Turns of one conversation over one list of caches.

    Args:
        model: from `mlx_lm.load`, converted (`tova_mlx.convert`).
        tokenizer: its tokenizer.
        system_prompt: text of a system message at the start.
        generate: options of every turn, as for `mlx_lm.stream_generate`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        system_prompt: str | None = None,
        **generate: Any,
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, generate
        self.system_prompt = system_prompt
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.caches = make_prompt_cache(self.model)
        # The last question and answer, and whether the answer's end was generated.
        self._last: tuple[str, str, bool] | None = None

    def ask(self, text: str, stop: Callable[[], bool] = lambda: False) -> Iterator[Any]:
        """The answer to `text`, piece by piece: what `stream_generate` yields.

        `stop` is asked between steps: if it says True the answer ends there, with the
        cache as complete as after any other answer.
        """
        tokens = self._new_tokens(text)
        answer, ended = "", False

        def between_chunks(done: int, total: int) -> None:
            if stop() and done < total:
                raise _Stopped

        try:
            for piece in stream_generate(
                self.model,
                self.tokenizer,
                tokens,
                prompt_cache=self.caches,
                prompt_progress_callback=between_chunks,
                **self.options,
            ):
                answer += piece.text
                ended = piece.finish_reason == "stop"
                yield piece
                if stop():
                    break
        except _Stopped:
            # Half of the question is in the cache and nothing can take it out again.
            self.reset()
            raise CacheStateError(
                "Stopped before the question was read to its end. The conversation "
                "starts anew; ask again."
            ) from None
        self._last = (text, answer, ended)

    def save(self, path: str | Path) -> None:
        """Write caches and last exchange to a file. Raises CacheStateError."""
        metadata = {"tova_mlx_chat": json.dumps([self.system_prompt, self._last])}
        save_prompt_cache(path, self.caches, model=self.model, metadata=metadata)

    def load(self, path: str | Path) -> None:
        """Go on where `save` was called. Raises CacheStateError and changes nothing."""
        caches, metadata = load_prompt_cache(path, model=self.model)
        try:
            system_prompt, last = json.loads(metadata["tova_mlx_chat"])
            last = None if last is None else (str(last[0]), str(last[1]), bool(last[2]))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise CacheStateError(
                f"{path}: a saved prompt, but not one of a chat. Use a file that /save "
                "made."
            ) from error
        self.caches, self.system_prompt, self._last = caches, system_prompt, last

    def _new_tokens(self, text: str) -> list[int]:
        """The tokens of the next question that the cache has not seen."""
        if not text.strip():
            raise PromptError("The question is empty. Give at least one word.")
        if self.tokenizer.chat_template is None:
            return self._encode(text)
        if self._last is None:
            return self._encode(self._render([{"role": "user", "content": text}]))
        question, answer, ended = self._last
        seen = [{"role": "user", "content": question}]
        before = self._render(seen) + answer
        seen += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": text},
        ]
        after = self._render(seen)
        if not after.startswith(before):
            # A template that rewrites earlier turns; the new one stands by itself.
            return self._encode(self._render(seen[-1:]))
        tokens = self._encode(after[len(before) :])
        if ended and tokens[:1] and tokens[0] in self.tokenizer.eos_token_ids:
            tokens = tokens[1:]
        return tokens

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self.system_prompt is not None:
            system = {"role": "system", "content": self.system_prompt}
            messages = [system, *messages]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )

    def _encode(self, text: str) -> list[int]:
        special = self._last is None and self.tokenizer.chat_template is None
        return list(self.tokenizer.encode(text, add_special_tokens=special))


class _Stopped(Exception):
    """Asked to stop between two chunks of a question."""


@contextmanager
def stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """A function that says whether Ctrl-C was pressed inside; nothing is raised.

    An exception in the middle of a step would leave some layers a token ahead of
    others. A second Ctrl-C raises KeyboardInterrupt.
    """
    pressed = False

    def note(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
