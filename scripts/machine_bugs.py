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
                "storage/slots.py",
                "        if n <= 0:\n            return\n        to",
                "        to",
            ),
        ],
    ),
    Bug(
        "all taken back, no scores, and the kernel reads past them (defect 5)",
        [
            Edit(
                "storage/slots.py",
                "            self.__dict__ = vars(new)\n            return\n",
                "            self.offset, self.victim = 0, None\n"
                "            self.positions = self.scores = None\n"
                "            return\n",
            ),
            Edit("eviction/kernels.py", "if rule.memory and scores is None:", "if 0:"),
        ],
        (KERNELS,),
    ),
    Bug(
        "norms wait for the first eviction as a graph (defect 7)",
        [
            Edit(
                "caches/layer.py",
                "output = slots.tied(plain_attention(queries, keys, values, args))\n",
                "output = plain_attention(queries, keys, values, args)\n",
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
                "storage/slots.py",
                "if self.scores is not None and self.victim is not None:",
                "if False:",
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
                "storage/slots.py",
                "return evictions <= at_hand",
                "return evictions <= at_hand + 1",
            )
        ],
    ),
    Bug(
        "scores in the journal are taken for ordered",
        [
            Edit(
                "storage/slots.py",
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
        "a batch's new token has the score of the slot's last one",
        [
            Edit(
                "storage/stack.py",
                "write(self.scores, mx.zeros(slot.shape), slot)",
                "self.scores",
            )
        ],
        (BATCH, CACHE),
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
                "what fails leaves no trace.\n        slots = self._slots.twin()",
                "what fails leaves no trace.\n        slots = self._slots",
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
                "elif cache.offset != self._offset:",
                "elif False:",
            )
        ],
    ),
    Bug(
        "what was evicted before comes back plain into quantised slots",
        [
            Edit(
                "caches/layer.py",
                "stored, slots.journal.empty()",
                "stored, slots.journal",
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
            Edit("storage/state.py", "        _check(slots)\n    except", "    except"),
        ],
    ),
    Bug(
        "the kernel protects the recent tokens of a block's end",
        [
            Edit(
                "eviction/kernels.py",
                "newest_of_all - (n_steps - 1 - step) - n_recent",
                "newest_of_all - n_recent",
            )
        ],
        (KERNELS,),
    ),
    Bug(
        "the kernel forgets that the norm of the value counts",
        [
            Edit(
                "eviction/kernels.py", "if (WEIGHTED) weight *=", "if (false) weight *="
            )
        ],
        (KERNELS,),
    ),
]
