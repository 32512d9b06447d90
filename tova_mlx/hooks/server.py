"""What mlx-lm's server uses of ours while `tova-mlx serve` runs.

A store whose caches have seen what the server believes, a check of requests, and a
listener for many clients at once. Knows nothing of the command line.
"""

import copy
import itertools
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from typing import Any

from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

from ..errors import UnsupportedModelError
from .layers import leaves, seen
from .template import beginning_of


class PromptStore(LRUPromptCache):
    """mlx-lm's store of conversations; what it hands out is brought in line first.

    The server stores caches under all tokens of a conversation, also if they have not
    seen the last of them: after speculative decoding the model's may lack one and the
    draft model's two, or all that were generated without a draft.

    pinned: how many of the first tokens the conversation that is asked for next pins;
    None: nothing is pinned.
    """

    pinned: int | None = None

    def fetch_nearest_cache(
        self, model: Any, tokens: list[int]
    ) -> tuple[list[Any] | None, list[int]]:
        """Caches that have all seen the same first tokens, and the tokens after them.

        At least one token is left: without one, nothing can be generated. If a layer
        cannot be brought there, all tokens are left, to be read anew.
        """
        caches, rest = super().fetch_nearest_cache(model, tokens)
        if caches is None:
            return None, tokens
        parts = list(leaves(caches))
        if not all(self._pins_as_many(c) for c in parts):
            return None, tokens
        # A state-space layer does not say what it has seen, and gives nothing back.
        placed = [c for c in parts if seen(c) is not None]
        common = min([len(tokens) - max(1, len(rest)), *map(seen, placed)])
        ahead = [c for c in placed if seen(c) > common]
        back = bool(ahead) if placed else not rest
        if common <= 0 or (back and len(placed) < len(parts)):
            return None, tokens
        if not all(_take_back(c, seen(c) - common) for c in ahead):
            return None, tokens
        return caches, tokens[common:]

    def _pins_as_many(self, cache: Any) -> bool:
        options = getattr(cache, "options", None)
        if options is None or self.pinned is None:
            return True
        return cache.rule == options.rule.pinning(self.pinned)


def generator(pin: Callable[[Any, int], None]) -> type[server.ResponseGenerator]:
    """Return mlx-lm's generation of answers, where each conversation pins its own.

    That is all that comes before the text of its first question. pin: lets a model's
    new caches pin their first tokens.
    """

    class Generator(server.ResponseGenerator):
        def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
            made = super()._tokenize(tokenizer, request, args)
            n = self._beginning(tokenizer, request, args, made[0])
            provider = self.model_provider
            for model in (provider.model, provider.draft_model):
                if model is not None:
                    pin(model, n)
            if isinstance(self.prompt_cache, PromptStore):
                self.prompt_cache.pinned = n
            return made

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


def _take_back(cache: Any, n: int) -> bool:
    """Take back the newest n tokens of one layer; whether it could."""
    can_trim = getattr(cache, "can_trim", None)
    can = cache.is_trimmable() if can_trim is None else can_trim(n)
    return can and cache.trim(n) == n


def check_draft(model: Any) -> None:
    """Refuse a draft model next to one whose caches mlx-lm would mix with its own.

    mlx-lm takes as many caches for the model as it has layers, and the rest of the list
    for the draft model. Raises UnsupportedModelError.
    """
    caches, layers = len(make_prompt_cache(model)), len(model.layers)
    if caches != layers:
        raise UnsupportedModelError(
            f"{type(model).__module__} has {caches} caches for {layers} layers, and "
            "mlx-lm would give its draft model the wrong ones. Leave --draft-model out."
        )


class Provider(server.ModelProvider):
    """Loads its model before it listens: an error then ends the command."""

    def __init__(self, arguments: Any):
        super().__init__(arguments)
        self.load_default()

    def _load(self, *paths: Any, **named: Any) -> None:
        super()._load(*paths, **named)
        if self.draft_model is not None:
            try:
                check_draft(self.model)
            except UnsupportedModelError:
                self.reset()
                raise


class Listener(ThreadingHTTPServer):
    """Takes many clients that come at the same moment; Python's own turns some away."""

    request_queue_size = 1024


def request_handler(max_draft_tokens: int | None) -> type[server.APIHandler]:
    """mlx-lm's handler of requests; more drafts than can be taken back are an error."""

    class Handler(server.APIHandler):
        def validate_model_parameters(self) -> None:
            super().validate_model_parameters()
            self._validate("num_draft_tokens", int, max_val=max_draft_tokens)

    return Handler
