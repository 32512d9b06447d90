"""Bugs for the kernels of the prefill scan: what tests/mslcheck must find of each."""

from kernel_bugs import (
    _BARRIER,
    _BOUNDS,
    _COMPILE,
    _EARLY,
    _LINT,
    _NOT_WRITTEN,
    _RACE,
    _SHUFFLE,
    _WRONG,
    _without,
)
from mslcheck.findings import Kind
from mslcheck.seeded import Bug

_SHARES = f"{_BARRIER}\n\n  const int newest"
_FLAGS = f"{_BARRIER}\n#define"
_MOST = f"{_BARRIER}\n\n    float most"
_BEST = f"{_BARRIER}\n      for (int s = 0"
_END = f"    }}\n    {_BARRIER}\n  }}"
_WEIGHT = "metal::exp(float(logits[at]) - top[h]) * factor[h]"
_SEEN_HELD = "if (held_until[own + c] == n_steps) tova_add"


BUGS = [
    # Both kernels: the header.
    Bug(
        "ties to the newest",
        "other_column < column)",
        "other_column > column)",
        _WRONG,
    ),
    Bug(
        "the best is evicted",
        "other_score < score ||",
        "other_score > score ||",
        _WRONG,
    ),
    Bug("hidden columns counted", "if (x == -INFINITY) return;", "", _WRONG),
    Bug("sum not rescaled", "sum * metal::exp(high - higher)", "sum", _WRONG),
    Bug("lanes not rescaled", ": sum * metal::exp(high - highest)", ": sum", _WRONG),
    Bug("maximum of one lane", "simd_max(high)", "high", _WRONG),
    Bug("NaN remembered", "tova_is_nan(x) ? 0.0f : x", "x", _WRONG),
    Bug("no address space", "thread float& score", "float& score", _LINT),
    # What does not depend on who is evicted.
    Bug("no barrier before the shares", _SHARES, _without(_SHARES), _EARLY),
    Bug("evicted before, and in the sums", _SEEN_HELD, "tova_add", _WRONG),
    Bug(
        "sums over tokens to come",
        "for (int c = lane; c < n_seen; c += 32) {\n      if (held_until",
        "for (int c = lane; c < n_columns; c += 32) {\n      if (held_until",
        _WRONG,
    ),
    Bug("the own column not seen", "n_steps + step + 1", "n_steps + step", _WRONG),
    Bug("rows of the block's beginning", "counts[0] + row", "row", _WRONG),
    Bug(
        "learned sinks not in the sums",
        "if (SINKS && lane == 0) tova_add(high, sum",
        "if (false) tova_add(high, sum",
        _WRONG,
    ),
    Bug(
        "learned sinks in every lane",
        "if (SINKS && lane == 0) tova_add(high, sum",
        "if (SINKS) tova_add(high, sum",
        _WRONG,
    ),
    Bug("learned sinks past the heads", "head % n_heads", "head", _BOUNDS),
    Bug("norms of another head", "head / GROUP", "head", (*_BOUNDS, *_WRONG)),
    Bug(
        "a recent token too few", "newest - n_recent;", "newest - n_recent + 1;", _WRONG
    ),
    Bug(
        "recent as of the last step",
        "positions[own + n_columns - 1] - (n_steps - 1 - step)",
        "positions[own + n_columns - 1]",
        _WRONG,
    ),
    Bug("a first token too few", "n_sinks - 1 :", "n_sinks - 2 :", _WRONG),
    Bug(
        "shares of protected tokens",
        "held && unprotected ?",
        "held ?",
        _WRONG,
    ),
    Bug(
        "a range begins nowhere",
        "if (c == 0 && limit < position)",
        "if (false)",
        _NOT_WRITTEN,
    ),
    Bug(
        "no share of what is not held",
        "c < n_columns; c += ROW",
        "c < n_seen; c += ROW",
        _NOT_WRITTEN,
    ),
    Bug(
        "heads on top of each other",
        "(line * HEADS + h) * n_columns",
        "line * HEADS * n_columns",
        (*_RACE, *_NOT_WRITTEN),
    ),
    Bug("double", "float score = 0.0f;", "double score = 0.0f;", _LINT),
    # The scan.
    Bug("no barrier after the flags", _FLAGS, _without(_FLAGS), _EARLY),
    Bug("no barrier before the candidates", _MOST, _without(_MOST), _EARLY),
    Bug("no barrier before the best", _BEST, _without(_BEST), _EARLY),
    Bug("no barrier after a row", _END, _without(_END), _RACE),
    Bug(
        "barrier for device memory only",
        _BEST,
        _BEST.replace("mem_threadgroup", "mem_device"),
        _RACE,
    ),
    Bug(
        "simdgroup_barrier for threadgroup_barrier",
        _MOST,
        _MOST.replace("threadgroup_barrier", "simdgroup_barrier"),
        _EARLY,
    ),
    Bug(
        "flags not all set",
        "w < (n_columns + 31) / 32",
        "w < n_columns / 32",
        (Kind.UNINITIALISED,),
    ),
    Bug(
        "flags past the columns",
        "c < w * 32 + 32 && c < n_columns",
        "c < w * 32 + 32",
        _BOUNDS,
    ),
    Bug("flags past the array", "evicted[MAX_COLUMNS / 32]", "evicted[1]", _BOUNDS),
    Bug(
        "evicted before and held again",
        "if (held_until[own + c] != n_steps) flags",
        "if (false) flags",
        _WRONG,
    ),
    Bug(
        "evicted in other rows and forgotten",
        "last[own + c] = held_until[own + c];",
        "last[own + c] = n_steps;",
        _WRONG,
    ),
    Bug("the evicted stay in the sums", "sum - simd_sum(gone)", "sum", _WRONG),
    Bug(
        "one lane's evicted leave the sums",
        "sum - simd_sum(gone)",
        "sum - gone",
        (Kind.SIMDGROUP, *_WRONG),
    ),
    Bug(
        "only a simdgroup's evicted leave",
        "i < n_victims; i += 32",
        "i < n_victims && i < 32; i += 32",
        _WRONG,
    ),
    Bug(
        "one more has been evicted",
        "i < n_victims; i",
        "i <= n_victims; i",
        (*_EARLY, *_BOUNDS),
    ),
    Bug("digits lost unseen", "|| rest < sum * LOST", "", _WRONG),
    Bug(
        "a lost head with the evicted",
        "if (TOVA_HELD(c)) tova_add(high, rest",
        "tova_add(high, rest",
        _WRONG,
    ),
    Bug(
        "a lost head without learned sinks",
        "if (SINKS && lane == 0) tova_add(high, rest",
        "if (false) tova_add(high, rest",
        _WRONG,
    ),
    Bug(
        "a lost head's candidates", "lost ? INFINITY : sum / rest", "sum / rest", _WRONG
    ),
    Bug("a lost head's shares", "if (MEMORY && !lost)", "if (MEMORY)", _WRONG),
    Bug(
        "who has the least share is evicted",
        "bound * most * 1.0001f + 1e-37f",
        "bound",
        _WRONG,
    ),
    Bug(
        "ratio of the first head",
        "h < HEADS; h += 32) most",
        "h < 1; h += 32) most",
        _WRONG,
    ),
    Bug(
        "least of too many simdgroups",
        "lane < SIMDGROUPS ? least[lane] : INFINITY",
        "least[lane]",
        _BOUNDS,
    ),
    Bug("the evicted are the least", "if (TOVA_HELD(c)) mine", "mine", _WRONG),
    Bug("the evicted are candidates", "if (!TOVA_HELD(c) || ", "if (", _WRONG),
    Bug("candidates by the least share", _WEIGHT, f"{_WEIGHT} / ratio[h]", _WRONG),
    Bug(
        "a head is missing",
        "for (int h = 0; h < HEADS; ++h) {\n        if (MEMORY",
        "for (int h = 1; h < HEADS; ++h) {\n        if (MEMORY",
        _WRONG,
    ),
    Bug("a sum and no mean", "score * (1.0f / float(HEADS))", "score", _WRONG),
    Bug("memory that never fades", "memory[0] * new_scores", "new_scores", _WRONG),
    Bug(
        "memory forgotten",
        "if (MEMORY) score += memory",
        "if (false) score += memory",
        _WRONG,
    ),
    Bug(
        "the last scores only of candidates",
        "MEMORY || lost || step == n_steps - 1",
        "MEMORY || lost",
        _WRONG,
    ),
    Bug(
        "protected and evicted",
        "if (c >= unprotected && c < recent) tova_take",
        "tova_take",
        _WRONG,
    ),
    Bug("evicts from the start", "step >= first_evicting", "step >= 0", _WRONG),
    Bug(
        "eviction noted a step late",
        "last[own + victim] = step;",
        "last[own + victim] = step + 1;",
        _WRONG,
    ),
    Bug(
        "eviction noted by the row",
        "last[own + victim] = step;",
        "last[own + victim] = row;",
        _WRONG,
    ),
    Bug("flag of another column", "1u << (victim & 31)", "1u << (victim & 15)", _WRONG),
    Bug(
        "every simdgroup notes the eviction",
        "tid == victim % THREADS",
        "lane == 0",
        _RACE,
    ),
    Bug(
        "another thread notes the eviction",
        "tid == victim % THREADS",
        "tid == 0",
        _RACE,
    ),
    Bug(
        "best of too few simdgroups",
        "best_score[SIMDGROUPS]",
        "best_score[SIMDGROUPS - 1]",
        _BOUNDS,
    ),
    Bug("room for a victim too few", "victims[ROWS]", "victims[ROWS - 1]", _BOUNDS),
    Bug(
        "shuffle in a branch",
        _SHUFFLE,
        f"if (lane < apart) {{ {_SHUFFLE} }} {_SHUFFLE}",
        (Kind.INACTIVE_LANE, Kind.SIMDGROUP),
    ),
    Bug("a step's scores not noted", "if (nth >= 0)", "if (nth > 0)", _NOT_WRITTEN),
    Bug(
        "writes to an input",
        "new_scores[own + c] = score;",
        "scores[own + c] = score;",
        _COMPILE,
    ),
    Bug(
        "half for a sum",
        "float gone = 0.0f;",
        "half gone = 0.0f;",
        (*_COMPILE, *_WRONG),
    ),
    Bug("not ASCII", "// What the evicted leave", "// Où the evicted leave", _LINT),
]
