"""One row of one layer in float64, by the papers' rules and nothing else.

Every token is a record, every held set a list of records, one query head is attended
with at a time. Knows no slots, blocks, arrays of a cache, journals or masks: what a
query may not see, or sees with a bias, is told per pair of tokens.
"""

from dataclasses import dataclass, field

import numpy as np

# Two scores closer than this may be told apart differently in float32.
NEAR = 1e-4


@dataclass
class Token:
    """Keys and values [n_kv_heads, ·] in float64; the norm of each value."""

    uid: int
    key: np.ndarray
    value: np.ndarray
    norm: np.ndarray


@dataclass
class Held:
    position: int
    score: float = 0.0
    rotary: int = 0


@dataclass
class Step:
    """Outputs [n_heads, ·], who was seen, and how near the decision was."""

    output: np.ndarray
    seen: list[list[int]]
    # By chooser and tokens held then: "once" evicts several at a step.
    near: dict[tuple[int, int], list[int]] = field(default_factory=dict)


class Layer:
    """The state of a policy after some tokens; `rule` as `Rule.as_dict()` gives it."""

    def __init__(
        self,
        rule,
        n_heads,
        n_kv_heads,
        scale,
        sinks=None,
        once=False,
        rotation=None,
        recalls=False,
    ):
        # Whether what was evicted is attended to all the same.
        self.recalls = recalls
        # With rotation (period, function of a vector and an angle's position): keys and
        # queries are told unrotated.
        self.period, self.rotate = rotation or (0, None)
        self.next = 0
        self.rule, self.n_heads, self.n_kv_heads = rule, n_heads, n_kv_heads
        self.scale, self.sinks, self.once = scale, sinks, once
        self.group = n_heads // n_kv_heads
        per_head = rule["granularity"] == "head"
        heads = np.arange(n_heads)
        self.choosers = np.split(heads, n_kv_heads) if per_head else [heads]
        self.tokens: list[Token] = []
        self.held: list[list[Held]] = [[] for _ in self.choosers]
        # By chooser: after which token each position was evicted.
        self.evicted: list[dict[int, int]] = [{} for _ in self.choosers]
        self.past: list[tuple] = []

    @property
    def limit(self):
        return self.rule["max_size"] or 10**9

    def positions(self):
        return [[h.position for h in held] for held in self.held]

    def back(self, n):
        """As if the newest n tokens had not come."""
        if n > 0:
            to = max(0, len(self.tokens) - n)
            self.next, self.held, self.evicted = self.past[to]
            del self.tokens[to:], self.past[to:]

    def read(self, queries, tokens, bias, forced=None):
        """Read one chunk; a `Step` for each token.

        queries: per token [n_heads, D]; bias(query, key): added to the logit, of uids.
        forced: {(position, chooser, tokens held): the victim} where the rule is to be
        told.
        """
        steps = [
            self._step(q, token, bias, forced or {}, evict=not self.once)
            for q, token in zip(queries, tokens, strict=True)
        ]
        if self.once:
            for c, held in enumerate(self.held):
                while len(held) > self.limit:
                    self._evict(c, held, steps[-1], forced or {})
        return steps

    def key(self, kv, position, rotary):
        """The key [D] of a token, as it is at a rotary position."""
        key = self.tokens[position].key[kv]
        return self.rotate(key, rotary) if self.rotate else key

    def attend(self, query, places, bias, uid, heads=None, rotary=None):
        """Weights per head and outputs [n_heads, ·] of one query over positions."""
        rotary = rotary or places
        weights, outputs = {}, {}
        for h in range(self.n_heads) if heads is None else heads:
            kv = h // self.group
            keys = [self.key(kv, *p) for p in zip(places, rotary, strict=True)]
            logits = np.array(keys) @ query[h] * self.scale
            logits = logits + [bias(uid, self.tokens[p].uid) for p in places]
            top = max(logits.max(), -np.inf if self.sinks is None else self.sinks[h])
            e = np.exp(logits - top)
            extra = 0 if self.sinks is None else np.exp(self.sinks[h] - top)
            weights[h] = e / (e.sum() + extra)
            outputs[h] = weights[h] @ [self.tokens[p].value[kv] for p in places]
        return weights, outputs

    def _step(self, query, token, bias, forced, evict):
        position = len(self.tokens)
        held = [[Held(h.position, h.score, h.rotary) for h in c] for c in self.held]
        self.past.append((self.next, held, [dict(e) for e in self.evicted]))
        self.tokens.append(token)
        rotary, self.next = self.next, self.next + 1
        if self.rotate:
            query = [self.rotate(q, rotary) for q in query]
        out, seen = [None] * self.n_heads, []
        step = Step(np.zeros(0), seen)
        for c, (heads, held) in enumerate(zip(self.choosers, self.held, strict=True)):
            held.append(Held(position, rotary=rotary))
            places = [h.position for h in held]
            seen.append(places)
            weights, outputs = self.attend(
                query, places, bias, token.uid, heads, [h.rotary for h in held]
            )
            for h in heads:
                out[h] = outputs[h]
            if self.recalls:
                self._recall(c, query, places, bias, token.uid, out)
            received = np.zeros(len(held))
            for h in heads:
                share = weights[h]
                if self.rule["value_weighted"]:
                    kv = h // self.group
                    share = share * [self.tokens[p].norm[kv] for p in places]
                received += share / len(heads)
            for h, amount in zip(held, received, strict=True):
                h.score = self.rule["memory"] * h.score + amount
            if evict and len(held) > self.limit:
                self._evict(c, held, step, forced)
        step.output = np.array(out)
        n = len(self.tokens)
        if self.period and n > self.limit and n % self.period == 0:
            for held in self.held:
                for i, h in enumerate(held):
                    h.rotary = i
            self.next = self.limit
        return step

    def _evict(self, c, held, step, forced):
        newest = len(self.tokens) - 1
        free = [
            h
            for h in held
            if h.position >= self.rule["n_sinks"]
            and h.position <= newest - self.rule["n_recent"]
        ]
        if self.rule["reads_keys"]:
            scores = self._unlikeness(c, held, free)
        elif self.rule["reads_attention"]:
            scores = [h.score for h in free]
        else:
            scores = [float(h.position) for h in free]
        low = min(scores)
        slack = NEAR if self.rule["reads_keys"] else NEAR * abs(low) + 1e-12
        first = free[scores.index(low)].position
        near = [
            h.position for h, s in zip(free, scores, strict=True) if s - low < slack
        ]
        if self.rule["reads_attention"] or self.rule["reads_keys"]:
            step.near[c, len(held)] = [p for p in near if p != first]
        victim = forced.get((newest, c, len(held)), first)
        held[:] = [h for h in held if h.position != victim]
        self.evicted[c][victim] = newest

    def _recall(self, c, query, places, bias, uid, out):
        """Attend to what was evicted too; nothing of it is scored."""
        for h in self.choosers[c]:
            kv = h // self.group
            rows = [self.tokens[p] for p in [*places, *self.evicted[c]]]
            logits = np.array([t.key[kv] @ query[h] * self.scale for t in rows])
            logits[: len(places)] += [bias(uid, self.tokens[p].uid) for p in places]
            sink = [] if self.sinks is None else [self.sinks[h]]
            e = np.exp(np.array([*logits, *sink]) - max([*logits, *sink]))
            out[h] = e[: len(rows)] @ [t.value[kv] for t in rows] / e.sum()

    def _unlikeness(self, c, held, free):
        """Minus the mean cosine to the mean unit key, over the chooser's KV heads."""
        total = np.zeros(len(free))
        kv_heads = sorted({h // self.group for h in self.choosers[c]})
        for kv in kv_heads:
            unit = {}
            for h in held:
                key = self.key(kv, h.position, h.rotary)
                length = np.linalg.norm(key)
                unit[h.position] = key / length if length else key * 0
            mean = np.mean(list(unit.values()), axis=0)
            length = np.linalg.norm(mean)
            for i, h in enumerate(free):
                total[i] -= unit[h.position] @ mean / length if length else 0
        return list(total / len(kv_heads))
