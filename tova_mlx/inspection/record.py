"""What is known of a text that was read: when each layer evicted each token.

Steps count tokens: what is evicted after step s was seen by token s, and no longer by
the next. A token that is held to the end has the number of tokens read.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from ..policies import RECALL_BLOCK
from .page import html, write
from .pieces import Pieces

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

# Settings that a page shows side by side.
MOST_SETTINGS = 2


@dataclass(frozen=True)
class Recalled:
    """What came back in one layer, for any of its KV heads; int32.

    times: [T], how many tokens could read each token again; first, last: [T], the steps
    at which it came back first and last, -1 if it never did; blocks: [T, m], of which
    blocks of 16 neighbours each token could read what was evicted, ascending, then -1:
    block b has the tokens from 16 * b on.
    """

    times: Ints
    first: Ints
    last: Ints
    blocks: Ints


@dataclass(frozen=True)
class LayerRecord:
    """One layer.

    layer: its index in the model; evicted: int32 [H', T], the step after which each
    token was evicted, T if it is held to the end; scores: float32 [H', T], what the
    policy ranked it with then (the lowest goes), NaN if it is held, None for a policy
    that goes by age; recalled: None without recall. H' is 1, or n_kv_heads where each
    KV head evicts a token of its own.
    """

    layer: int
    evicted: Ints
    scores: Floats | None
    recalled: Recalled | None = None

    def held(self, n: int) -> npt.NDArray[np.bool_]:
        """Which tokens are held when n were read, bool [H', T]."""
        tokens = np.arange(self.evicted.shape[1])
        return (tokens < n) & (self.evicted >= n)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it: null for what is not."""
        n = self.evicted.shape[1]
        evicted = [[None if s == n else s for s in h] for h in self.evicted.tolist()]
        scores = recalled = None
        if self.scores is not None:
            scores = [
                [x if math.isfinite(x) else None for x in head]
                for head in self.scores.tolist()
            ]
        if self.recalled is not None:
            recalled = {
                "times": self.recalled.times.tolist(),
                "first": [None if s < 0 else s for s in self.recalled.first.tolist()],
                "last": [None if s < 0 else s for s in self.recalled.last.tolist()],
                "blocks": [
                    [b for b in read if b >= 0]
                    for read in self.recalled.blocks.tolist()
                ],
            }
        return {
            "layer": self.layer,
            "evicted": evicted,
            "scores": scores,
            "recalled": recalled,
        }


@dataclass(frozen=True)
class Record:
    """A text read under one setting.

    max_kv_size: tokens kept per layer, None for no limit; options: others that were
    given, as `make_prompt_cache` takes them; layers: those that a policy bounds.
    """

    policy: str
    max_kv_size: int | None
    layers: tuple[LayerRecord, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The setting in a few words."""
        size = "" if self.max_kv_size is None else f" {self.max_kv_size:,}"
        others = (f"{k.replace('_', ' ')} {v}" for k, v in self.options.items())
        return ", ".join([f"{self.policy}{size}", *others])

    def share_held(self) -> Floats:
        """The share of the layers that hold each token at the end, float32 [T].

        Where each KV head evicts a token of its own, a layer counts by its heads.
        """
        n = self.layers[0].evicted.shape[1]
        shares = [layer.held(n).mean(axis=0) for layer in self.layers]
        return np.mean(shares, axis=0).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "max_kv_size": self.max_kv_size,
            "options": {k: str(v) for k, v in self.options.items()},
            "layers": [layer.to_dict() for layer in self.layers],
        }


@dataclass(frozen=True)
class Inspection:
    """What `inspect` gives: a text in tokens, and which were held when.

    model: what it is called; ids: of the tokens; pieces: their text; records: one for
    each setting.
    """

    model: str
    ids: tuple[int, ...]
    pieces: Pieces
    records: tuple[Record, ...]

    def beside(self, other: "Inspection") -> "Inspection":
        """Return both settings side by side.

        Raises OptionError: of other tokens, or more than two settings.
        """
        if self.ids != other.ids:
            raise OptionError(
                f"Of {len(self.ids)} tokens and of {len(other.ids)} other ones: two "
                "settings are shown side by side for one text. Read the same text."
            )
        records = self.records + other.records
        if len(records) > MOST_SETTINGS:
            raise OptionError(
                f"{len(records)} settings: a page shows {MOST_SETTINGS} side by side "
                "at most. Make several pages."
            )
        return Inspection(self.model, self.ids, self.pieces, records)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it."""
        return {
            "model": self.model,
            "tokens": len(self.ids),
            "ids": list(self.ids),
            "pieces": list(self.pieces.texts),
            "piece_of": list(self.pieces.piece_of),
            "special": sorted(self.pieces.special),
            "recalled_block": RECALL_BLOCK,
            "settings": [record.to_dict() for record in self.records],
        }

    def to_html(self) -> str:
        """One page that needs nothing else: no network, no other files."""
        return html(self)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, all of it or nothing.

        Raises EvaluationError if it cannot be written; what was there stays.
        """
        return write(self, Path(path))
