"""The prompt files of mlx-lm's tools: fitted to model and options, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache

from ..caches.layer import PolicyKVCache
from ..errors import CacheStateError, ModelLoadError
from ..hooks.layers import leaves
from ..hooks.server import check_draft
from ..models import saved
from .models import resolve

_UNBOUNDED = (mlx_lm_cache.KVCache, mlx_lm_cache.QuantizedKVCache)


class PromptFile:
    """What `--prompt-cache-file` names, in one run of a tool.

    mlx-lm reads the file before its model and goes on with whatever it holds. Here
    `load` reads it, and `fit` compares it as soon as the model is there.

    Args:
        options: of `cache_options`.
        model: the `--model` given to the tool, if any.
        num_draft_tokens: drafts that must be taken back; 0 without a draft model.
    """

    def __init__(
        self, options: dict[str, Any], model: str | None, num_draft_tokens: int
    ):
        self.options, self.named, self.drafts = options, model, num_draft_tokens
        self.model: nn.Module | None = None
        self.path = Path()
        self.caches: list[Any] = []
        self.metadata: dict[str, str] = {}

    def load(self, file_name: str, return_metadata: bool = False) -> Any:
        """As mlx-lm's `load_prompt_cache`; checks what can be without the model.

        Raises CacheStateError.
        """
        self.path = Path(file_name)
        self.caches, self.metadata = saved.load_prompt_cache(file_name)
        self._check_origin()
        self._check_options()
        return (self.caches, self.metadata) if return_metadata else self.caches

    def fit(self, model: nn.Module, convert: Callable[[], Any]) -> Any:
        """Convert a model that the tool loaded; returns what `convert` does.

        The first one goes on with the file's caches. A second one drafts: new caches
        for it are put behind them. Raises CacheStateError, UnsupportedModelError.
        """
        main, self.model = self.model, self.model or model
        if not self.caches:
            return convert()
        if main is not None:
            check_draft(main)
            report = convert()
            self.caches.extend(mlx_lm_cache.make_prompt_cache(model))
            return report
        if self.unbounded and self.options["kv_bits"] is None:
            # Compared with the caches that the model has without us.
            _check_unbounded(self.path, self.caches, self.metadata, model)
            return convert()
        report = convert()
        saved._check_fits(self.path, self.caches, self.metadata, model)
        return report

    def save(
        self, file_name: str, cache: list[Any], metadata: dict[str, str] | None = None
    ) -> None:
        """As mlx-lm's `save_prompt_cache`, but all of it or nothing.

        Raises CacheStateError.
        """
        saved.save_prompt_cache(file_name, cache, model=self.model, metadata=metadata)

    @property
    def unbounded(self) -> bool:
        """Whether the file holds caches that mlx-lm made without us."""
        parts = list(leaves(self.caches))
        ours = any(isinstance(c, PolicyKVCache) for c in parts)
        return not ours and any(isinstance(c, _UNBOUNDED) for c in parts)

    def _check_origin(self) -> None:
        """Refuse what another program saved, or what another model read."""
        if "tova_mlx_chat" in self.metadata:
            raise CacheStateError(
                f"{self.path}: a conversation that /save made. Use /load in tova-mlx "
                "chat, or save a prompt with tova-mlx run cache_prompt."
            )
        missing = {"model", "tokenizer_config"} - set(self.metadata)
        if missing or not self.caches:
            what = " and ".join(sorted(missing)) or "caches"
            raise CacheStateError(
                f"{self.path}: has no {what}. Save the prompt with tova-mlx run "
                "cache_prompt."
            )
        name = self.metadata["model"]
        if self.named is not None:
            if not _same(self.named, name):
                raise CacheStateError(
                    f"{self.path}: saved with --model {name}, not {self.named}. Use "
                    "that model, or read the prompt again."
                )
            # mlx-lm compares the names only.
            self.metadata["model"] = self.named

    def _check_options(self) -> None:
        options = self.options
        if self.unbounded and options["policy"] != "full":
            raise CacheStateError(
                f"{self.path}: caches of mlx-lm's own, without limit, but the options "
                f"say --policy {options['policy']} --max-kv-size "
                f"{options['max_kv_size']}. Use --policy full, or save the prompt with "
                "tova-mlx run cache_prompt."
            )
        for cache in leaves(self.caches):
            limited = isinstance(cache, PolicyKVCache) and cache.max_size is not None
            if limited and cache.journal < self.drafts:
                raise CacheStateError(
                    f"{self.path}: {cache.journal} drafted tokens can be taken back, "
                    f"but --num-draft-tokens is {self.drafts}. Draft fewer tokens."
                )


def check_place(file_name: str) -> None:
    """Refuse a file that cannot be written, before its prompt is read.

    Raises CacheStateError.
    """
    path = saved.prompt_path(file_name)
    if path.is_dir() or not path.parent.is_dir():
        reason = "a directory" if path.is_dir() else f"no directory {path.parent}"
        raise CacheStateError(f"{path}: {reason}. Name a file in a directory.")


def _same(a: str, b: str) -> bool:
    """Whether two `--model` are one directory or hub id."""
    try:
        return a == b or Path(resolve(a)).resolve() == Path(resolve(b)).resolve()
    except ModelLoadError:
        return False


def _check_unbounded(
    path: Path, caches: list[Any], metadata: dict[str, str], model: nn.Module
) -> None:
    """Compare mlx-lm's own caches with those of an unconverted model.

    Raises CacheStateError.
    """
    if not mx.metal.is_available():
        # As the model: half precision is slower here.
        for cache in leaves(caches):
            if isinstance(getattr(cache, "keys", None), mx.array):
                cache.keys = cache.keys.astype(mx.float32)
                cache.values = cache.values.astype(mx.float32)
    # mlx-lm quantises as it goes on, so the model's new caches are plain.
    plain = [
        mlx_lm_cache.KVCache() if isinstance(c, mlx_lm_cache.QuantizedKVCache) else c
        for c in caches
    ]
    saved._check_fits(path, plain, metadata, model)
