"""Mistakes in what is held, and where: caches, positions, batches and the journal."""

from .mutant import Mutant

_CACHES = [
    (
        "a memory does not see a chunk that fits",
        "if length == 1 or (fits and not rule.memory):",
        "if length == 1 or fits:",
    ),
    (
        "a chunk may have two tokens more than fit",
        "slots.offset + length <= rule.max_size\n",
        "slots.offset + length <= rule.max_size + 2\n",
    ),
    (
        "twins are one",
        "        twin = object.__new__(type(self))\n"
        "        twin.__dict__.update(self.__dict__)\n",
        "        twin = self\n",
    ),
    (
        "the newest token goes round into a protected slot",
        "return self.rule.n_sinks if slot == self.rule.max_size else slot + 1",
        "return 0 if slot == self.rule.max_size else slot + 1",
    ),
    (
        "positions by age go round all slots",
        "ages = (slot - slots) % (rule.max_size + 1 - rule.n_sinks)",
        "ages = (slot - slots) % (rule.max_size + 1)",
    ),
    (
        "no slot for the newest token",
        "return slots if limit is None else min(slots, limit + 1)",
        "return slots if limit is None else min(slots, limit)",
    ),
    (
        "the position of the newest token is stale",
        "return write(known, fresh.positions, fresh.slot)",
        "return known",
    ),
    (
        "the norm of the newest value is that of its slot's last",
        "self.value_norms = write(self.value_norms, norms_of(values), slot)",
        "self.value_norms = self.value_norms + 0.0",
    ),
    (
        "norms are those of the model's type",
        "return mx.linalg.norm(values.astype(mx.float32), axis=-1)",
        "return mx.linalg.norm(values, axis=-1)",
        ("test_cache.py::test_norms_of_values_in_half_precision_do_not_overflow",),
    ),
    (
        "scores stay in the order of the slots when a block comes",
        "self.scores = self._held(self.scores, order)",
        "self.scores = first_slots(self.scores, self.size())",
    ),
    (
        "norms do not move with their tokens",
        "for name in PER_SLOT[4:]:",
        "for name in PER_SLOT[5:]:",
    ),
    (
        "values are gathered as if nothing was evicted",
        "self.values = after(gather(self.values, columns), logged)",
        "self.values = after(first_slots(self.values, columns.shape[2]), logged)",
    ),
    (
        "keys held are not in order of position",
        "return self._held(self.keys_to_read, order), self._held(self.values, order)",
        "return self._held(self.keys_to_read, None), self._held(self.values, order)",
    ),
    (
        "the victim is counted as held",
        "positions = mx.where(slots == victim, LAST, positions)",
        "positions = mx.where(slots == victim, positions, positions)",
    ),
    (
        "an attention leaves its update waiting",
        "        output = self._attend(queries, keys, values, args)\n"
        "        self._pending = None\n",
        "        output = self._attend(queries, keys, values, args)\n",
    ),
    (
        "nobody notices that nobody attended",
        "if self._pending is not None and self._must_attend:",
        "if self._pending is not None and not self._must_attend:",
    ),
    (
        "a mask is as wide as what was seen",
        "return create_causal_mask(N, self.size())",
        "return create_causal_mask(N, self.seen)",
    ),
    (
        "a window's mask comes a token late",
        "evicts = limit is not None and self.seen + N > limit + 1",
        "evicts = limit is not None and self.seen + N > limit + 2",
    ),
    (
        "a window of the model's is not refused",
        "if limit is not None and self.seen + N > limit:",
        "if limit is not None and self.seen > limit:",
    ),
    (
        "keys are shared by their id alone",
        "return shared if shared and shared.entries and shared.entries[0] is keys else",
        "return shared if shared and shared.entries else",
        (),
        "Equivalent: the keys given are alive for as long as their id is known, so no "
        "others have it.",
    ),
    (
        "what was given is shared after the next update",
        "            _by_keys.pop(id(self.entries[0]), None)\n"
        "        self.entries, self._attend = None, plain_attention",
        "            _by_keys.pop(id(self.entries[0]), None)\n"
        "        self.entries, self._attend = self.entries, plain_attention",
    ),
    (
        "a second attention sees what is evicted",
        "self._shared.attend_with(partial(attend_again, blocks))",
        "self._shared.attend_with(plain_attention)",
    ),
    (
        "layers out of step are told to take back the wrong number",
        "behind = first.seen - cache.seen",
        "behind = cache.seen - first.seen",
    ),
    (
        "the first layer's offset is stale",
        "self._first, self._offset = ref(cache), cache.seen",
        "self._first, self._offset = ref(cache), self._offset",
    ),
    (
        "a copy watches the layers of the original",
        "twin._first, twin._offset = ref(memo[id(first)]), self._offset",
        "twin._first, twin._offset = self._first, self._offset",
    ),
    (
        "a copy of a cache is observed",
        "    def __deepcopy__(self, memo: Any) -> Observer:\n        return Observer()",
        "    def __deepcopy__(self, memo: Any) -> Observer:\n        return self",
    ),
    (
        "an observer is told of the step before",
        "self.observer.evicted([self.newest], gather(self.positions, victim), own)",
        "self.observer.evicted([self.newest - 1], gather(self.positions, victim), own)",
    ),
    (
        "bytes of the journal are not counted",
        "return super().nbytes + others +",
        "return super().nbytes +",
        ("test_cache.py::test_generate_step_runs_and_bytes_stay", "test_journal.py"),
    ),
    (
        "the bound forgets the victim's slot",
        "total = per_slot * (limit + 1) + 4 * heads",
        "total = per_slot * limit + 4 * heads",
        ("test_cache.py::test_generate_step_runs_and_bytes_stay",),
    ),
]

_POSITIONS = [
    (
        "a key is turned on twice",
        "for positions in (-start, stop):",
        "for positions in (start, stop):",
    ),
    (
        "a key is turned the other way",
        "for positions in (-start, stop):",
        "for positions in (-stop, start):",
    ),
    (
        "heads of a group have each other's positions",
        "flat = vectors.reshape(batch, groups, heads // groups, n, width)",
        "flat = vectors.reshape(batch, heads // groups, groups, n, width)",
    ),
    (
        "the next rotary position is one too far",
        "self.shift = self.offset - self.size()\n",
        "self.shift = self.newest - self.size()\n",
    ),
    (
        "new tokens have the rotary positions of before",
        "setattr(self, name, write(array, positions - shift, slot))",
        "setattr(self, name, write(array, positions, slot))",
    ),
    (
        "a block has the rotary positions of before",
        'new[name] = new["positions"] - self.shift if there else None',
        'new[name] = new["positions"] if there else None',
    ),
    (
        "a part of a chunk is turned from where the chunk begins",
        "behind = first + start, slots.next_rotary",
        "behind = first, slots.next_rotary",
    ),
    (
        "the queries of a part are not turned with its keys",
        "            asked, new[0] = (\n",
        "            _, new[0] = (\n",
    ),
    (
        "a second renumbering turns from the first positions",
        "before: Any = self.positions if self.rotary is None else self.rotary",
        "before: Any = self.positions",
    ),
    (
        "the victim gets a rotary position too",
        "number = mx.where(is_victim, there, number)",
        "number = mx.where(is_victim, number, number)",
        ("test_machine.py::test_a_victim_that_comes_back_has_its_own_position",),
    ),
    (
        "a renumbering comes whether something was evicted or not",
        "if when is None or not self.evicted or not when.is_due(self.offset):",
        "if when is None or not when.is_due(self.offset):",
    ),
    (
        "renumbering begins a period early",
        "first = -(-self.start // self.period) * self.period",
        "first = self.start // self.period * self.period",
    ),
    (
        "a renumbering where it begins is left out",
        "return offset % self.period == 0 and offset >= self.start",
        "return offset % self.period == 0 and offset > self.start",
    ),
    (
        "auto waits for the end of the range",
        "return Renumbering(trained - PERIOD + 1)",
        "return Renumbering(trained + 1)",
    ),
    (
        "a range that was stretched is not known",
        'return int(said * factor) if kind in ("linear", "dynamic") else said',
        "return said",
    ),
    (
        "a limit as long as the range is renumbered",
        "if limit + PERIOD > trained:",
        "if limit > trained:",
    ),
    (
        "quantised keys are turned back",
        "dequantized(self.keys), self.stored[..., 0], self.wanted[..., 0]",
        "dequantized(self.keys), self.wanted[..., 0], self.stored[..., 0]",
    ),
    (
        "quantised keys are stored for their new positions",
        "                self.stored_rotary = before\n",
        "                self.stored_rotary = rotary\n",
    ),
    (
        "each layer has the first one's rotation",
        "rotations = iter(rotations_of(model, default_caches))",
        "rotations = iter(rotations_of(model, default_caches)[:1] * 999)",
    ),
    (
        "a model that stores positions is taken",
        'raise unrotated(name, "stores more than keys that depends on positions")',
        "pass",
    ),
    (
        "a rotation that nothing explains is taken",
        'raise unrotated(name, "does more with its keys than to rotate them")',
        "pass",
    ),
]

_BATCH = [
    (
        "a batch is of the caches themselves",
        "return cls([copy.deepcopy(c) for c in caches])",
        "return cls(list(caches))",
    ),
    (
        "a row that is taken out is the batch's own",
        "return copy.deepcopy(self._rows[idx])",
        "return self._rows[idx]",
    ),
    (
        "padding is not filtered with its rows",
        "self._left = [self._left[i] for i in indices]",
        "self._left = self._left[: len(indices)]",
    ),
    (
        "lengths are not filtered with their rows",
        "self._lengths = [self._lengths[i] for i in indices]",
        "self._lengths = self._lengths[: len(indices)]",
    ),
    (
        "rows that join come first",
        "self._rows = [*self._unstacked(), *other._unstacked()]",
        "self._rows = [*other._unstacked(), *self._unstacked()]",
    ),
    (
        "rows of other options may join",
        "        check_alike(_made(self), _made(other))\n",
        "",
    ),
    (
        "padding on the left is counted as tokens of the row",
        "end = left + self._lengths[i] - self._done",
        "end = self._lengths[i] - self._done",
    ),
    (
        "every chunk of a padded prompt is the first",
        "        self._done += length\n",
        "",
    ),
    (
        "padding goes on after the prompt",
        "        self._lengths, self._done = None, 0\n\n",
        "        self._done = 0\n\n",
    ),
    (
        "tokens after padding are rotated as if there was none",
        "return mx.array([o - a for o, a in zip(self._rotary, ahead, strict=True)])",
        "return mx.array([o for o, a in zip(self._rotary, ahead, strict=True)])",
    ),
    (
        "a row sees the padding of others",
        "            mask[i, 0, start:stop] = False\n",
        "",
    ),
    (
        "all rows have the mask of the first",
        "mask = mask[row : row + 1]",
        "mask = mask[:1]",
    ),
    (
        "rows that pin differently are stacked",
        "return all(row.rule == self._rows[0].rule for row in self._rows[1:])",
        "return True",
    ),
    (
        "a stack forgets that rows were renumbered",
        "return [offset - shift for offset, shift in pairs]",
        "return [offset for offset, shift in pairs]",
    ),
    (
        "a row of a stack forgets that it was renumbered",
        "part.offset, part.shift = self.offsets[row], self.shifts[row]",
        "part.offset, part.shift = self.offsets[row], 0",
    ),
    (
        "rows are renumbered when all are due",
        "return any(o > limit and when.is_due(o) for o in self.offsets)",
        "return all(o > limit and when.is_due(o) for o in self.offsets)",
    ),
    (
        "a row of a stack forgets where it wrote last",
        "        part.written = self._written[row]\n",
        "",
    ),
    (
        "a row of a stack has the first one's slots",
        "own = each(lambda a, n=n: mx.contiguous(a[here, :, :n]), entries)",
        "own = each(lambda a, n=n: mx.contiguous(a[:1, :, :n]), entries)",
    ),
    (
        "a row that evicted begins where it would have",
        "[p.size() - 1 if p.victim is None else p.written for p in parts]",
        "[p.size() - 1 for p in parts]",
    ),
    (
        "a row that is not full writes into a victim",
        "return mx.where(full, self.victim, self._slot)",
        "return mx.where(full, self.victim, self.victim)",
    ),
    (
        "the slot after the last is taken for free",
        "taken = [min(o, o if limit is None else limit + 1) for o in self.offsets]",
        "taken = [min(o, o if limit is None else limit) for o in self.offsets]",
        ("test_own_policy.py::test_rows_of_a_batch_are_what_they_are_alone",),
    ),
    (
        "the newest of a row is the one to come",
        "return mx.array(self.offsets, mx.int32)[:, None, None] - 1",
        "return mx.array(self.offsets, mx.int32)[:, None, None]",
    ),
    (
        "a step sees slots that are free",
        "seen = _taken_slots([tokens_held(o, limit) + 1 for o in offsets])",
        "seen = _taken_slots([tokens_held(max(offsets), limit) + 1 for o in offsets])",
    ),
    (
        "a stack has no journal of its own length",
        "part = self._stack.part(i, self.options.journal)",
        "part = self._stack.part(i, 0)",
    ),
]

_BACK = "test_rotary.py::test_tokens_taken_back_take_back_what_they_renumbered"
_JOURNAL = [
    (
        "scores of a step that was taken back are kept",
        "scores=tuple(s for s in self.scores if s.step < step)",
        "scores=self.scores",
    ),
    (
        "renumberings that were taken back are kept",
        "renumbered=tuple(r for r in self.renumbered if r.step < step)",
        "renumbered=self.renumbered",
        (_BACK,),
    ),
    (
        "the token that was evicted first is not brought back",
        "return [e for e in self.evicted if e.step >= step]",
        "return [e for e in self.evicted if e.step > step]",
    ),
    (
        "the journal holds the oldest",
        "return parts[-self.length :] if self.length else ()",
        "return parts[: self.length] if self.length else ()",
    ),
    (
        "the journal holds one less",
        "return parts[-self.length :] if self.length else ()",
        "return parts[-self.length :][1:] if self.length else ()",
    ),
    (
        "the last renumbering is taken back and not the first",
        "return next((r for r in self.renumbered if r.step >= step), None)",
        "return next((r for r in self.renumbered[::-1] if r.step >= step), None)",
        (_BACK,),
    ),
    (
        "evicted tokens are logged a step late",
        "        n = logged[0].shape[2]\n        first = self.offset - n\n",
        "        n = logged[0].shape[2]\n        first = self.offset - n + 1\n",
    ),
    (
        "the first of a block are logged for the last",
        "late = columns[..., -n:]",
        "late = columns[..., :n]",
    ),
    (
        "the oldest is logged as if nothing was protected",
        "oldest = self.newest - (limit - self.rule.n_sinks)",
        "oldest = self.newest - limit",
    ),
    (
        "scores before a step are logged for the one before it",
        "before = ScoresBefore(self.offset, scores)",
        "before = ScoresBefore(self.offset - 1, scores)",
    ),
    (
        "scores before a block's steps are logged a step late",
        "first = slots.offset - len(result.scores_before)",
        "first = slots.offset - len(result.scores_before) + 1",
    ),
    (
        "the victim of what was taken back is written next",
        "slots.offset, slots.victim = to, None",
        "slots.offset = to",
    ),
    (
        "scores are not taken back",
        "        slots.remember(_ordered_scores(before, slots.size()))\n",
        "            pass\n",
    ),
    (
        "scores are taken back in the order of the slots",
        "return gather(before.scores, in_order(before.positions, before.victim, n))",
        "return before.scores[..., :n]",
    ),
    (
        "a policy that remembers is taken back without scores",
        "if slots.rule.memory and slots.journal.scores_before(to) is None:",
        "if slots.rule.memory and to < 0:",
    ),
    (
        "evictions before the limit are counted",
        "evictions = 0 if limit is None else slots.offset - max(to, limit)",
        "evictions = 0 if limit is None else slots.offset - to",
    ),
    (
        "the last victim cannot come back",
        "at_hand = len(slots.journal.evicted_since(to)) + (slots.victim is not None)",
        "at_hand = len(slots.journal.evicted_since(to))",
    ),
    (
        "what is taken back is held before all others",
        "return mx.argsort(mx.where(positions < to, positions, LAST), axis=-1)",
        "return mx.argsort(mx.where(positions < to, positions, -1), axis=-1)",
    ),
    (
        "the slot of the last victim does not come back",
        "n = slots.size() if slots.victim is None else slots.keys.shape[2]",
        "n = slots.size()",
    ),
    (
        "norms do not come back",
        "for name in Evicted._fields[1:]:",
        "for name in ('keys', 'values', 'positions', 'rotary', 'stored_rotary'):",
    ),
    (
        "nobody observes who went back to nothing",
        "        new.observer = self.observer\n",
        "",
        (
            "test_hooks.py::test_who_went_back_to_nothing_is_still_observed_and_a_copy_is_not",
        ),
    ),
    (
        "a cache that went back to nothing is not renumbered",
        "            self.storage,\n            self.renumbering,\n",
        "            self.storage,\n            None,\n",
        (_BACK,),
    ),
    (
        "what a cut evicted is logged as if step by step",
        "n = 0 if once else min(self.journal.length, n)",
        "n = min(self.journal.length, n)",
    ),
    (
        "what waits to be attended to is not taken back",
        "self._slots, self._pending = slots, None",
        "self._slots = slots",
    ),
    (
        "an update that waits is counted twice",
        "return before, n - (self.seen - before.offset)",
        "return before, n",
    ),
    (
        "mlx-lm trims who cannot",
        "if num_tokens <= 0 or not all(_can_trim(c, n) for c, n in parts):",
        "if num_tokens <= 0:",
    ),
    (
        "drafts that stay are not said",
        "if ours and num_tokens > 0 and not can:",
        "if ours and num_tokens > 0 and not can and not ours:",
    ),
    (
        "drafts are refused where there is a journal",
        'getattr(c, "journal", 0) or c.is_trimmable()',
        "c.is_trimmable()",
    ),
    (
        "rotary positions are not taken back",
        "rotary[place] = np.where(known, old[place][found], rotary[place])",
        "rotary[place] = np.where(known, rotary[place], rotary[place])",
        (_BACK,),
    ),
    (
        "a renumbering that is not known is taken back",
        "first > slots.offset or (known is not None and known.step == first - 1)",
        "True",
        ("test_rotary.py::test_a_renumbering_from_before_a_file_is_not_taken_back",),
    ),
    (
        "a policy with memory can be trimmed by any number",
        "return self.seen == 0 or not (self._slots.evicted or self.rule.memory)",
        "return self.seen == 0 or not self._slots.evicted",
    ),
]


def _all(area: str, given: list) -> list[Mutant]:
    return [Mutant(name, area, *edit) for name, *edit in given]


HOLDING = [
    *_all("caches", _CACHES),
    *_all("positions", _POSITIONS),
    *_all("batch", _BATCH),
    *_all("journal", _JOURNAL),
]
