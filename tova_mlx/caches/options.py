"""The options of a cache, checked and resolved once for all layers of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import OptionError
from ..policies import Rule, resolve_options
from ..storage.formats import Storage, storage_for
from ..storage.rotation import Renumbering

# Newest tokens that can be taken back after something was evicted.
JOURNAL = 16
MOST_JOURNAL = 4096
# Bits of evicted rows where the cache's own are stored as they come.
_ARCHIVED = 4


@dataclass(frozen=True)
class ArchiveOptions:
    """Where what is evicted is kept on disk.

    path: a directory that nobody else uses; limit: bytes, None for none; forgets:
    whether a cache goes on without what it evicts once nothing can be written.
    """

    path: str
    limit: int | None = None
    forgets: bool = False


@dataclass(frozen=True)
class CacheOptions:
    """What the cache of any layer is made with; see `PolicyKVCache`.

    recall: slots beside those of the rule, for what it evicted last; archived: how what
    goes from there to the archive is kept; archive: where, None for in memory.
    """

    rule: Rule
    storage: Storage
    prefill: str
    journal: int
    renumbering: Renumbering | None = None
    recall: int = 0
    archived: Storage | None = None
    archive: ArchiveOptions | None = None

    def __post_init__(self) -> None:
        """Raises OptionError."""
        policy, journal = self.rule.policy, self.journal
        if self.prefill not in ("stepwise", "once"):
            raise OptionError(
                f"{policy}: prefill={self.prefill!r} is not known. "
                "Use 'stepwise' or 'once'."
            )
        if self.prefill == "once" and not self.rule.reads_attention:
            raise OptionError(
                f"{policy} does not read prefill='once': it cuts by attention. "
                "Leave it out."
            )
        if self.prefill == "once" and self.renumbering is not None:
            raise OptionError(
                f"{policy}: prefill='once' evicts wherever chunks end, so positions "
                "cannot be renumbered within them. Use positions='original'."
            )
        if self.recall:
            self._check_recall()
        if isinstance(journal, bool) or not isinstance(journal, int) or journal < 0:
            raise OptionError(
                f"{policy}: journal={journal!r} is not a whole number of tokens. "
                "Use 0 or more."
            )
        if journal > MOST_JOURNAL:
            raise OptionError(
                f"{policy}: journal={journal} keeps keys and values of as many more "
                f"tokens. Use at most {MOST_JOURNAL}."
            )

    def _check_recall(self) -> None:
        policy = self.rule.policy
        if self.prefill == "once":
            raise OptionError(
                f"{policy}: prefill='once' evicts wherever chunks end, so what is "
                "archived would depend on them. Use recall=0."
            )
        if self.renumbering is not None:
            raise OptionError(
                f"{policy}: recall={self.recall} brings tokens back to the positions "
                "that they had. Use positions='original', or recall=0."
            )

    @classmethod
    def resolve(
        cls,
        max_size: int | None,
        policy: str = "tova",
        *,
        prefill: str = "stepwise",
        journal: int = JOURNAL,
        kv_bits: int | tuple[int, int] | None = None,
        kv_group_size: int = 64,
        renumbering: Renumbering | None = None,
        recall: int = 0,
        archive: ArchiveOptions | None = None,
        **options: Any,
    ) -> CacheOptions:
        """Check the public options; those of `PolicyKVCache`. Raises OptionError."""
        stored = storage_for(kv_bits, kv_group_size)
        rule = resolve_options(policy, max_size, options, recall)
        archived = None
        if recall:
            plain = stored.is_plain
            archived = storage_for(_ARCHIVED, kv_group_size) if plain else stored
        elif archive is not None:
            raise OptionError(
                f"archive={archive.path!r} is read with recall only. Use recall=64 for "
                "example, or leave archive out."
            )
        return cls(
            rule, stored, prefill, journal, renumbering, recall, archived, archive
        )

    def describe(self) -> str:
        """Say all that decides what is held, for errors."""
        said = {**self.rule.as_dict(), **self.storage.options()}
        if self.renumbering is not None:
            said["positions"] = str(self.renumbering)
        if self.recall:
            said["recall"] = self.recall
        return ", ".join(f"{k}={v}" for k, v in said.items())
