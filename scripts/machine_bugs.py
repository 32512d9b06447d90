"""Bugs that the state machines must find: one after the other, put in by text.

Used by `scripts/state_machine.py --mutants`. The first three are defects that the
package once had.
"""

from typing import NamedTuple

CACHE, BATCH, KERNELS = "cache", "batch", "cache on kernels"


class Edit(NamedTuple):
    """A text in a file of the package, there once, and what takes its place."""

    file: str
    old: str
    new: str


class Bug(NamedTuple):
    """What is wrong, and the machines that are to find it, in turn."""

    what: str
    edits: list[Edit]
    kinds: tuple[str, ...] = (CACHE, BATCH)


BUGS = [
    Bug(
        "to take back no token revives the evicted one (defect 1)",
        [
            Edit("caches/layer.py", "        if not n:\n            return 0\n", ""),
            Edit(
                "storage/rewinding.py",
                "    if n <= 0:\n        return\n    to",
                "    to",
            ),
        ],
    ),
    Bug(
        "all taken back, no scores, and the kernel reads past them (defect 5)",
        [
            Edit(
                "storage/rewinding.py",
                "        slots.empty()\n",
                "        slots.offset, slots.victim = 0, None\n"
                "        slots.positions = slots.scores = None\n",
            ),
            Edit(
                "eviction/step_kernel.py",
                "mx.zeros(positions.shape) if rule.memory else nothing()",
                "nothing()",
            ),
        ],
        (KERNELS,),
    ),
    Bug(
        "norms wait for the first eviction as a graph (defect 7)",
        [
            Edit(
                "caches/chunk.py",
                "slots.settle()\n    return Attended(slots.tied(",
                "slots.settle()\n    return Attended((",
            )
        ],
    ),
    Bug(
        "a step remembers all of the old score",
        [
            Edit(
                "eviction/step.py",
                "rule.memory * scores + received",
                "scores + received",
            )
        ],
    ),
    Bug(
        "a step protects one recent token too many",
        [
            Edit(
                "eviction/step.py",
                "positions <= newest - rule.n_recent",
                "positions < newest - rule.n_recent",
            )
        ],
    ),
    Bug(
        "the scan protects one recent token too many",
        [
            Edit(
                "eviction/scan.py",
                "positions > self._first + step - self.rule.n_recent",
                "positions >= self._first + step - self.rule.n_recent",
            )
        ],
    ),
    Bug(
        "the scan leaves learned sinks out",
        [Edit("eviction/scan.py", "[..., 0] + self._extra[:, :, step]", "[..., 0]")],
    ),
    Bug(
        "a token is not seen by the query after which it is evicted",
        [Edit("attention/block.py", "& (last >= step)", "& (last > step)")],
    ),
    Bug(
        "a new token has the score of the slot's last one",
        [
            Edit(
                "storage/fields.py",
                "if self.scores is not None:\n            self.scores = write",
                "if False:\n            self.scores = write",
            )
        ],
    ),
    Bug(
        "norms stay in the order of the slots when a block comes",
        [
            Edit(
                "storage/slots.py",
                "before = self._held(getattr(self, name), order)",
                "by = None if name == 'value_norms' else order\n"
                "                    before = self._held(getattr(self, name), by)",
            )
        ],
    ),
    Bug(
        "the journal keeps a step that was taken back",
        [Edit("storage/journal.py", "if e.step < step)", "if e.step <= step)")],
    ),
    Bug(
        "one token more than the journal holds may be taken back",
        [
            Edit(
                "storage/rewinding.py",
                "return evictions <= at_hand",
                "return evictions <= at_hand + 1",
            )
        ],
    ),
    Bug(
        "scores in the journal are taken for ordered",
        [
            Edit(
                "storage/logged_slots.py",
                "known = (self.scores, self.positions, self.victim)",
                "known = (self.scores,)",
            )
        ],
    ),
    Bug(
        "a row that is just full writes into a victim's slot",
        [
            Edit(
                "storage/stack.py",
                "mx.array([o > limit for",
                "mx.array([o >= limit for",
            )
        ],
        (BATCH, CACHE),
    ),
    Bug(
        "in a kernel the new token has the score of the slot's last one",
        [
            Edit("eviction/step_kernel.py", "MEMORY && c != fresh ?", "MEMORY ?"),
        ],
        (KERNELS,),
    ),
    Bug(
        "padding on the left is one token longer",
        [
            Edit(
                "caches/batch.py",
                "max(0, left - self._done))\n            stop",
                "max(0, left - self._done + (left > 0)))\n            stop",
            )
        ],
        (BATCH,),
    ),
    Bug(
        "a window keeps one newest token less",
        [
            Edit(
                "eviction/window.py",
                "np.concatenate([np.arange(rule.n_sinks), newest])",
                "np.concatenate([np.arange(rule.n_sinks), newest - 1])",
            )
        ],
    ),
    Bug(
        "an update that fails has changed the cache",
        [
            Edit(
                "caches/layer.py",
                "no trace.\n        slots, chunk = self._slots.twin()",
                "no trace.\n        slots, chunk = self._slots",
            )
        ],
    ),
    Bug(
        "layers that are behind give back as many tokens",
        [
            Edit(
                "hooks/trimming.py",
                "(c, max(0, num_tokens - behind(c)))",
                "(c, num_tokens)",
            )
        ],
    ),
    Bug(
        "layers do not notice that they are not in step",
        [
            Edit(
                "caches/lockstep.py",
                "elif cache.seen != self._offset:",
                "elif False:",
            )
        ],
    ),
    Bug(
        "what was evicted before comes back plain into quantised slots",
        [
            Edit(
                "storage/slots.py",
                "storage, self.journal.empty()",
                "storage, self.journal",
            )
        ],
    ),
    Bug(
        "keys that were evicted count in the mean key",
        [Edit("policies/keydiff.py", "keys.directed & held)", "keys.directed | held)")],
    ),
    Bug(
        "what the oldest tokens were is not noted in a block",
        [
            Edit(
                "attention/evict.py",
                "    slots.log_evicted(to_mlx(np.broadcast_to(evicted",
                "    (to_mlx(np.broadcast_to(evicted",
            )
        ],
    ),
    Bug(
        "scores are not saved",
        [
            Edit(
                "storage/state.py",
                "slots.positions, slots.scores, slots.value_norms",
                "slots.positions, _, slots.value_norms",
            ),
            Edit("storage/state.py", "        _check(slots)\n        if", "        if"),
        ],
    ),
    Bug(
        "the kernel protects the recent tokens of a block's end",
        [
            Edit(
                "eviction/scan_sources.py",
                "positions[own + n_columns - 1] - (n_steps - 1 - step)",
                "positions[own + n_columns - 1]",
            )
        ],
        (KERNELS,),
    ),
    Bug(
        "the kernel forgets that the norm of the value counts",
        [
            Edit(
                "eviction/scan_sources.py",
                "if (WEIGHTED) {\n          share *=",
                "if (false) {\n          share *=",
            )
        ],
        (KERNELS,),
    ),
]
