"""What mlx-lm's server keeps: conversations, and the models that it loads."""

from collections.abc import Callable
from typing import Any

from mlx_lm import server
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

from ..errors import UnsupportedModelError
from .layers import leaves, seen


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
    """Loads its model before it listens: an error then ends the command.

    find: says where the files of a model are, or raises. mlx-lm lets go of the model
    that it has before it looks for the one that a request names. takes_rows: says
    whether a model can read a batch.
    """

    def __init__(
        self,
        arguments: Any,
        find: Callable[[str], Any] = str,
        takes_rows: Callable[[Any], bool] = lambda _: True,
    ):
        super().__init__(arguments)
        self._find, self._takes_rows = find, takes_rows
        self.load_default()

    def _load(
        self,
        model_path: str,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        for path in (model_path, draft_model_path):
            if path is not None:
                self._find(path)
        super()._load(model_path, adapter_path, draft_model_path)
        if self.draft_model is not None:
            try:
                check_draft(self.model)
            except UnsupportedModelError:
                self.reset()
                raise
        self.is_batchable = self.is_batchable and self._takes_rows(self.model)
