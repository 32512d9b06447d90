"""mlx-lm's thread that generates answers, which no request brings to an end."""

import copy
import itertools
import logging
import weakref
from collections.abc import Callable
from queue import Queue
from typing import Any

import mlx.core as mx
from mlx_lm import server
from mlx_lm.sample_utils import greedy_sampler

from ..errors import PromptError, RequestError
from .server import PromptStore
from .template import beginning_of


def generator(
    give_up: Callable[[str], Any], pin: Callable[[Any, int], None] | None = None
) -> type[server.ResponseGenerator]:
    """Return mlx-lm's generation of answers, which goes on after a failure.

    give_up: is told why nothing can be generated any more. pin: lets a model's new
    caches pin their first tokens; each conversation then pins all that comes before
    the text of its first question.
    """

    class Generator(server.ResponseGenerator):
        def __init__(self, *provider_and_store: Any):
            # Before mlx-lm starts the thread. Whoever waits for an answer holds its
            # queue.
            self._waiting: weakref.WeakSet[Queue[Any]] = weakref.WeakSet()
            self._took_one = False
            super().__init__(*provider_and_store)

        def _run_generate(self) -> None:
            while True:
                self._took_one = False
                try:
                    return self._generate()
                except Exception as error:
                    if not self._took_one:
                        return give_up(f"{type(error).__name__}: {error}")
                    self._recover(error)

        def _recover(self, error: Exception) -> None:
            """Tell all whose answers are lost, and drop what may have failed."""
            kind = type(error).__name__
            logging.error(
                f"Generating failed ({kind}: {error}). Answers in progress are lost.",
                exc_info=logging.getLogger().isEnabledFor(logging.DEBUG),
            )
            # The error may quote what one of them has asked.
            for queue in self._waiting:
                queue.put(RequestError(f"Generating failed ({kind}). Ask again."))
            self._waiting.clear()
            self.prompt_cache.trim_to(n_sequences=0)

        def _next_request(self, timeout: float | None = None) -> Any:
            taken = super()._next_request(timeout)
            if taken is not None:
                self._took_one = True
                self._waiting.add(taken[0])
            return taken

        def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
            made = super()._tokenize(tokenizer, request, args)
            self._rehearse(tokenizer, made[0], args)
            if pin is None:
                return made
            n = self._beginning(tokenizer, request, args, made[0])
            provider = self.model_provider
            for model in (provider.model, provider.draft_model):
                if model is not None:
                    pin(model, n)
            if isinstance(self.prompt_cache, PromptStore):
                self.prompt_cache.pinned = n
            return made

        def _rehearse(self, tokenizer: Any, prompt: list[int], args: Any) -> None:
            """Try what would end all answers of a batch if it failed among them.

            Raises RequestError, PromptError, and what mlx-lm does.
            """
            if not prompt:
                raise PromptError("prompt: it has no tokens to go on from. Send some.")
            key = self.model_provider.model_key
            self._make_state_machine(key, tokenizer, args.stop_words)
            bias = args.logits.logit_bias or {}
            sampler = server._make_sampler(args, tokenizer)
            drawn = sampler is not greedy_sampler
            if not (drawn or bias or server._make_logits_processors(args)):
                return
            tokens = mx.array(prompt)
            model: Any = self.model_provider.model
            # Of its logits only the shape: nothing is computed.
            vocabulary = model(tokens[None, -1:]).shape[-1]
            # MLX writes wherever an index points, also outside of an array.
            if not all(0 <= token < vocabulary for token in bias):
                raise RequestError(
                    f"logit_bias: a token is not within the {vocabulary} of the model. "
                    "Use those of its tokenizer."
                )
            logits = mx.zeros((1, vocabulary))
            for processor in server._make_logits_processors(args):
                logits = processor(tokens, logits)
            mx.eval(sampler(logits))

        def _beginning(
            self, tokenizer: Any, request: Any, args: Any, prompt: list[int]
        ) -> int:
            if request.request_type != "chat" or not tokenizer.has_chat_template:
                return 0
            told = lambda m: m["role"] == "system"  # noqa: E731
            system = list(itertools.takewhile(told, request.messages))

            def tokens_for(text: str) -> list[int]:
                first = copy.copy(request)
                first.messages = [
                    *copy.deepcopy(system),
                    {"role": "user", "content": text},
                ]
                return super(Generator, self)._tokenize(tokenizer, first, args)[0]

            begins = beginning_of(tokens_for)
            # A template may begin otherwise in a longer conversation.
            return len(begins) if prompt[: len(begins)] == begins else 0

    return Generator
