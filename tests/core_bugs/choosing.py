"""Mistakes in who is evicted: the policies, the prefill scan and the decode step."""

from .mutant import Mutant

_POLICIES = [
    (
        "full obeys a limit",
        "            size = None\n",
        "            size = max_size\n",
    ),
    ("window can be told of sinks", "    options=(),\n", ""),
    (
        "window protects the first token",
        "    options=(),\n",
        '    options=("n_sinks",),\n    n_sinks=1,\n',
    ),
    ("streaming has five sinks", "    n_sinks=4,\n", "    n_sinks=5,\n"),
    (
        "h2o remembers the last query only",
        "    memory=1.0,\n    recent_share=0.5,",
        "    memory=0.0,\n    recent_share=0.5,",
    ),
    (
        "h2o protects a quarter",
        "    memory=1.0,\n    recent_share=0.5,",
        "    memory=1.0,\n    recent_share=0.25,",
    ),
    (
        "h2o evicts alike in all heads",
        'granularity="head",\n    memory=1.0,\n    recent_share',
        "memory=1.0,\n    recent_share",
    ),
    (
        "tova protects recent tokens",
        'source="TOVA, arXiv 2401.06104",',
        'source="TOVA, arXiv 2401.06104",\n    recent_share=0.25,',
    ),
    (
        "tova remembers",
        'source="TOVA, arXiv 2401.06104",',
        'source="TOVA, arXiv 2401.06104",\n    memory=0.5,',
    ),
    (
        "tova evicts per head",
        'source="TOVA, arXiv 2401.06104",',
        'source="TOVA, arXiv 2401.06104",\n    granularity="head",',
    ),
    (
        "vatp does not weigh by values",
        "    value_weighted=True,\n    recent_share=0.5,",
        "    recent_share=0.5,",
    ),
    (
        "vatp protects a quarter",
        "    value_weighted=True,\n    recent_share=0.5,",
        "    value_weighted=True,\n    recent_share=0.25,",
    ),
    (
        "vatp fades",
        "    memory=1.0,\n    value_weighted=True,",
        "    memory=0.9,\n    value_weighted=True,",
    ),
    ("fade never fades", "    memory=0.9,\n", "    memory=1.0,\n"),
    (
        "fade does not weigh by values",
        "    value_weighted=True,\n    recent_share=0.25,",
        "    recent_share=0.25,",
    ),
    (
        "fade protects half",
        "    value_weighted=True,\n    recent_share=0.25,",
        "    value_weighted=True,\n    recent_share=0.5,",
    ),
    (
        "keydiff keeps what is most alike",
        "return mx.where(length > 0, distances / (2 * length), 0.0)",
        "return mx.where(length > 0, -distances / (2 * length), 0.0)",
    ),
    (
        "keydiff compares keys of any length",
        "units = keys * mx.where(directed, 1 / lengths, 0.0)",
        "units = keys",
    ),
    (
        "keydiff takes a sum for the mean",
        "shift = (counted / n)[:, :, None] @ keys.apart",
        "shift = counted[:, :, None] @ keys.apart",
    ),
    (
        "keydiff divides by all slots",
        "n = mx.maximum(counted.sum(axis=-1, keepdims=True), 1)",
        "n = mx.array(float(counted.shape[-1]))",
    ),
    (
        "keydiff leaves the centre out of the mean's length",
        "square = (keys.centre + shift).square()",
        "square = shift.square()",
    ),
    (
        "keydiff takes a key of no length for near",
        "distances = mx.where(keys.directed, distances, 1 + square)",
        "distances = mx.where(keys.directed, distances, 0.0)",
    ),
    (
        "keydiff evicts alike in all heads",
        '    granularity="head",\n    prepare=prepare,',
        "    prepare=prepare,",
    ),
    (
        "the recent share is rounded up",
        "int(self.recent_share * (size or 0))",
        "-int(-self.recent_share * (size or 0) // 1)",
    ),
    (
        "the memory that is asked for is not read",
        'memory=options.get("memory", self.memory)',
        "memory=self.memory",
    ),
    (
        "the granularity that is asked for is not read",
        'granularity=options.get("granularity", self.granularity)',
        "granularity=self.granularity",
    ),
    (
        "all tokens may be protected",
        "rule.max_size < protected + 1:",
        "rule.max_size < protected:",
    ),
    (
        "a token more than the protected is not enough",
        "rule.max_size < protected + 1:",
        "rule.max_size <= protected + 1:",
    ),
    (
        "all of a limit may be pinned",
        "pinned = min(n, self.max_size // 2)",
        "pinned = min(n, self.max_size)",
    ),
    (
        "pinned tokens come on top of sinks",
        "sinks = max(self.n_sinks, pinned)",
        "sinks = self.n_sinks + pinned",
    ),
    (
        "pinned and recent tokens leave no room",
        "self.max_size - 1 - sinks)",
        "self.max_size - sinks)",
    ),
    (
        "recall takes no slots from the rule",
        "        max_size -= recall\n",
        "        max_size -= 0\n",
        (
            "test_recall.py::test_bytes_stay_below_what_is_said_and_the_archive_is_counted_apart",
        ),
    ),
]

_SCAN = [
    (
        "ties of a block go to the newest",
        "victims = np.argmin(ranks, axis=1)",
        "victims = ranks.shape[1] - 1 - np.argmin(ranks[:, ::-1], axis=1)",
    ),
    (
        "a block evicts a step late",
        "n_held + step + 1 > limit",
        "n_held + step > limit",
    ),
    (
        "a block does not remember who evicts nobody",
        "if not (evicts or memory or step == length - 1):",
        "if not (evicts or step == length - 1):",
    ),
    (
        "a block fades what is new",
        "current = current * memory + received if memory else received",
        "current = current + received * memory if memory else received",
    ),
    (
        "a block takes a sum for the mean over the heads",
        "received *= np.float32(1 / self._heads)",
        "received *= np.float32(1)",
    ),
    (
        "the evicted of a block still take their share",
        "total = np.matmul(weights, held[:, :, None])[..., 0] +",
        "total = weights.sum(axis=-1) +",
    ),
    (
        "a query of a block does not see itself",
        "mx.arange(n - length, n)[:, None] >= mx.arange(n)",
        "mx.arange(n - length, n)[:, None] > mx.arange(n)",
    ),
    (
        "norms of another KV head in a block",
        "norms = np.repeat(np.array(columns.value_norms), per_head, axis=1)",
        "norms = np.tile(np.array(columns.value_norms), (1, per_head, 1))",
    ),
    (
        "sinks of another head in a block of several rows",
        "self._sinks = np.tile(learned, batch)",
        "self._sinks = np.repeat(learned, batch)",
    ),
    (
        "a block protects a first token too many as it comes",
        "if self._first + step >= self.rule.n_sinks:",
        "if self._first + step > self.rule.n_sinks:",
    ),
    (
        "a block protects a first token too few",
        "self._barred[positions < rule.n_sinks] = np.inf",
        "self._barred[positions < rule.n_sinks - 1] = np.inf",
    ),
    (
        "a block evicts a token twice",
        "        self._barred[self._each, victims] = np.inf\n",
        "",
    ),
    (
        "a victim of a block is still held",
        "        self.held[self._each, victims] = 0\n",
        "",
    ),
    (
        "a sum that lost its digits is taken as it is",
        "if total.min() < _LOST or self._doubtful[:, :, step].any():",
        "if self._doubtful[:, :, step].any():",
    ),
    (
        "a head that is not a number leaves the others' weights",
        "received[broken] = 0",
        "received[broken] += 0",
    ),
    (
        "scores of a step too few for the journal",
        "if step >= length - n_before:",
        "if step > length - n_before:",
    ),
    (
        "scores of after the step for the journal",
        "before.append(current)",
        "before.append(current * memory)",
    ),
    (
        "scores of an observer are of another column",
        "worth[self._each, victims] = scores[self._each, victims]",
        "worth[self._each, victims] = scores[:, 0]",
        ("test_inspect.py::test_scores_are_those_that_the_rule_gives",),
    ),
    (
        "a cut protects a recent token too many",
        "(ages > ages[:, -1:] - rule.n_recent)",
        "(ages >= ages[:, -1:] - rule.n_recent)",
    ),
    (
        "a cut protects a first token too many",
        "protected = (ages < rule.n_sinks)",
        "protected = (ages <= rule.n_sinks)",
    ),
    (
        "ties of a cut go to anybody",
        'np.argsort(ranks, axis=1, kind="stable")',
        "np.argsort(ranks, axis=1)",
    ),
    (
        "keys of a block are evicted a step late",
        "if limit is None or own + 1 <= limit:",
        "if limit is None or own <= limit:",
    ),
    (
        "keys that a block evicted are still compared",
        "last, held = mx.where(evicted, step, last), held & ~evicted",
        "last = mx.where(evicted, step, last)",
    ),
    (
        "keys of a block are compared before they came",
        "held = mx.broadcast_to(columns < n_held, positions.shape)",
        "held = mx.broadcast_to(columns < n_columns, positions.shape)",
    ),
    (
        "a window is a token too narrow",
        "(columns >= new[:, None] - recent)",
        "(columns > new[:, None] - recent)",
    ),
    (
        "sinks come on top of a window",
        "recent = rule.max_size - rule.n_sinks\n",
        "recent = rule.max_size\n",
    ),
    (
        "scores stay where they were between blocks",
        "_take(columns, kept), _take(steps.scores, kept)",
        "_take(columns, kept), steps.scores[..., :n_kept]",
    ),
    (
        "scores of the past are of who was held a step before",
        "self._seen(self.last, step - 1, step)",
        "self._seen(self.last, step - 1, step - 1)",
        ("test_journal.py",),
    ),
    (
        "masks of another KV head's columns",
        "index = mx.repeat(self.columns, n_heads // heads, axis=1)",
        "index = mx.tile(self.columns, (1, n_heads // heads, 1))",
    ),
    (
        "what another KV head sees",
        "visible = mx.repeat(visible, per_head, axis=1)",
        "visible = mx.tile(visible, (1, per_head, 1, 1))",
    ),
    (
        "the mask of the first block for all",
        "mask = mask[:, :, self.start : self.stop]",
        "mask = mask[:, :, : self.length]",
    ),
    (
        "columns of a block are taken for the first",
        "columns.shape[2] == n_held + stop)",
        "True)",
    ),
    (
        "a mask shows what was evicted",
        "return visible & mask",
        "return visible | mask",
    ),
    (
        "norms stay in the order of before",
        "norms if norms is None else gather(norms, block.columns)",
        "norms if norms is None else norms[..., : block.columns.shape[2]]",
    ),
]

_STEP = [
    (
        "a sum and no mean",
        "received = weights.reshape(batch, heads, -1, columns).mean(axis=2)",
        "received = weights.reshape(batch, heads, -1, columns).sum(axis=2)",
    ),
    (
        "the greatest weight for the mean",
        "received = weights.reshape(batch, heads, -1, columns).mean(axis=2)",
        "received = weights.reshape(batch, heads, -1, columns).max(axis=2)",
    ),
    (
        "heads are grouped across",
        "received = weights.reshape(batch, heads, -1, columns).mean(axis=2)",
        "received = weights.reshape(batch, -1, heads, columns).mean(axis=1)",
    ),
    (
        "a step fades what is new",
        "return rule.memory * scores + received",
        "return scores + rule.memory * received",
    ),
    (
        "values are not weighed in a step",
        "weights = weights * value_norms[:, :, None, :]",
        "weights = weights * 1.0",
    ),
    (
        "a row that is not a number is remembered",
        "received = mx.where(mx.isnan(received), 0.0, received)",
        "received = received + 0.0",
    ),
    (
        "a step protects a first token too many",
        "free = (positions >= rule.n_sinks)",
        "free = (positions > rule.n_sinks)",
    ),
    (
        "the best token leaves",
        "lowest = scores.min(axis=-1, keepdims=True)\n        ages = mx.where(scores >",
        "lowest = scores.max(axis=-1, keepdims=True)\n        ages = mx.where(scores <",
    ),
    (
        "ties of a step go to the first slot",
        "ages = mx.where(scores > lowest, _NEVER, ages)",
        "ages = mx.where(scores > lowest, 1, 0)",
    ),
    (
        "slots that hold nothing may be evicted",
        "candidates = free if held is None else free & held",
        "candidates = free",
        ("test_own_policy.py::test_rows_of_a_batch_are_what_they_are_alone",),
    ),
    (
        "a step chooses before it is full",
        "there = slots.positions if slots.evicted else None",
        "there = slots.positions",
    ),
    (
        "a score of the first head for all",
        "scores = scores.mean(axis=1, keepdims=True)\n    return choose_victim(",
        "scores = scores[:, :1]\n    return choose_victim(",
    ),
    (
        "sinks are counted as a token",
        "return output, weights[..., n_learned:]",
        "return output, weights[..., : weights.shape[-1] - n_learned]",
    ),
    (
        "a mask of bools hides nothing",
        "return mx.where(mask, logits, mx.array(-mx.inf, logits.dtype))",
        "return logits",
    ),
    (
        "additive masks are scaled",
        "scaled = _grouped(queries.astype(mx.float32), keys) * args.scale\n",
        "scaled = _grouped(queries.astype(mx.float32), keys) * abs(args.scale) ** 2\n",
    ),
]


def _all(area: str, given: list) -> list[Mutant]:
    return [Mutant(name, area, *edit) for name, *edit in given]


CHOOSING = [
    *_all("policies", _POLICIES),
    *_all("scan", _SCAN),
    *_all("step", _STEP),
]
