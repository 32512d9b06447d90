"""Bugs for the kernels of the prefill scan: what tests/mslcheck must find of each."""

from kernel_bugs import (
    _BARRIER,
    _BOUNDS,
    _COMPILE,
    _EARLY,
    _LINT,
    _NOT_WRITTEN,
    _RACE,
    _WRONG,
    _without,
)
from mslcheck.findings import Kind
from mslcheck.seeded import Bug

_SHARES = f"{_BARRIER}\n  for (int c = tid"
_FLAGS = f"{_BARRIER}\n#define"
_MOST = f"{_BARRIER}\n\n    float greatest"
_BEST = f"{_BARRIER}\n      for (int s = 0"
_END = f"    }}\n    {_BARRIER}\n  }}"
_WEIGHT = "metal::exp(float(logits[at]) - top[then + h]) / total[then + h]"
_SEEN_HELD = "if (held_until[own + c] == n_steps) tova_add"
_PARTNER = "const float other_low = simd_shuffle_xor(low, apart);"
_NEXT = "if (its > taken || (its == taken && next > c))"


BUGS = [
    # All kernels: the header.
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
        "a range begins nowhere",
        "if (c == 0 && limit < position)",
        "if (false)",
        _NOT_WRITTEN,
    ),
    Bug(
        "no share of what is not held",
        "float share = 0.0f;\n    if",
        "if (c >= n_seen) continue;\n    float share = 0.0f;\n    if",
        _NOT_WRITTEN,
    ),
    Bug("double", "float given = 0.0f;", "double given = 0.0f;", _LINT),
    Bug("shares by the first head's sum", "/ total[h]", "/ total[0]", _WRONG),
    # The scores: bounds before the scan, and what is handed on after it.
    Bug(
        "scores of another row",
        "logits_shape[3];\n  const int first = counts[0];",
        "logits_shape[3];\n  const int first = 0;",
        _WRONG,
    ),
    Bug("a step's scores not noted", "if (nth >= 0)", "if (nth > 0)", _NOT_WRITTEN),
    Bug(
        "scores noted a step early",
        "row - (n_rows - n_before)",
        "row + 1 - (n_rows - n_before)",
        (*_BOUNDS, *_NOT_WRITTEN),
    ),
    Bug(
        "scores of before forgotten", "MEMORY ? scores[own + c] : 0.0f", "0.0f", _WRONG
    ),
    Bug(
        "a token has scores before it is there",
        "held && c <= n_columns - n_steps + step",
        "held",
        _WRONG,
    ),
    Bug(
        "a token has nothing of its own step",
        "held && c <= n_columns",
        "held && c < n_columns",
        _WRONG,
    ),
    Bug("memory that never fades", "memory[0] * score + gain", "score + gain", _WRONG),
    Bug("memory forgotten", "MEMORY ? memory[0] * score + gain : gain", "gain", _WRONG),
    Bug("sums of the first row", "/ sums[line * HEADS + h]", "/ sums[h]", _WRONG),
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
        "least of too many simdgroups",
        "lane < SIMDGROUPS ? least[lane] : INFINITY",
        "least[lane]",
        _BOUNDS,
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
        "sums before the evictions handed on",
        "left_sums[line * HEADS + h] = rest;",
        "left_sums[line * HEADS + h] = sum;",
        _WRONG,
    ),
    Bug(
        "a head's tops not handed on",
        "left_tops[line * HEADS + h] = high;",
        "",
        _NOT_WRITTEN,
    ),
    Bug(
        "a lost head's ratio by another maximum",
        "sum * metal::exp(began - high) / rest",
        "sum / rest",
        _WRONG,
    ),
    Bug(
        "a head that sees nothing bounds",
        "more = sum > 0.0f ? INFINITY : 1.0f",
        "more = 1.0f",
        _WRONG,
    ),
    Bug(
        "who has the lowest bound is evicted",
        "(bound + SLACK) * most * 1.0001f",
        "bound",
        _WRONG,
    ),
    Bug(
        "ratio of the first head",
        "h < HEADS; h += 32) greatest",
        "h < 1; h += 32) greatest",
        _WRONG,
    ),
    Bug(
        "ratio of the last row",
        "MEMORY ? metal::max(most, greatest) : greatest",
        "greatest",
        _WRONG,
    ),
    Bug(
        "the evicted are evicted again",
        "if (c < begin || !TOVA_HELD(c)) continue;",
        "if (c < begin) continue;",
        _WRONG,
    ),
    Bug(
        "the first tokens are not protected",
        "if (c < begin || !TOVA_HELD(c)) continue;",
        "if (!TOVA_HELD(c)) continue;",
        _WRONG,
    ),
    Bug(
        "recent tokens are not protected",
        "metal::min(range[line * 2 + 1], n_seen)",
        "n_seen",
        _WRONG,
    ),
    Bug(
        "the next is evicted already",
        "if (next < begin || !TOVA_HELD(next)) continue;",
        "if (next < begin) continue;",
        _WRONG,
    ),
    Bug(
        "the next of another row",
        "const float its = lows[bounds * n_columns + next]",
        "const float its = lows[next]",
        _WRONG,
    ),
    Bug("alike, and only the oldest is taken", _NEXT, "if (its > taken)", _WRONG),
    Bug(
        "an exact score says that no other is lower",
        "- SLACK > best) break;",
        "- SLACK > -1.0f) break;",
        _WRONG,
    ),
    Bug(
        "bounds are scores",
        "tova_take(best, victim, score, c);",
        "tova_take(best, victim, low, c);",
        _WRONG,
    ),
    Bug(
        "another row's maximum",
        _WEIGHT,
        _WEIGHT.replace("top[then + h]", "top[h]"),
        _WRONG,
    ),
    Bug(
        "another head's sum",
        _WEIGHT,
        _WEIGHT.replace("total[then + h]", "total[then]"),
        _WRONG,
    ),
    Bug(
        "rows kept on top of each other",
        "MEMORY ? row * HEADS : 0",
        "0",
        (*_EARLY, *_WRONG, Kind.UNINITIALISED),
    ),
    Bug(
        "an exact score of this row only",
        "int from = MEMORY ? 0 : row;",
        "int from = row;",
        _WRONG,
    ),
    Bug(
        "an exact score of 32 rows",
        "from <= row; from += 32",
        "from <= row && from < 32; from += 32",
        _WRONG,
    ),
    Bug(
        "rows in another order",
        "simd_shuffle(gain, ushort(i))",
        "simd_shuffle(gain, ushort(31 - i))",
        _WRONG,
    ),
    Bug("exact scores never fade", "memory[0] * score + nth", "score + nth", _WRONG),
    Bug(
        "exact scores from nothing",
        "float score = MEMORY ? scores[own + c] : 0.0f;\n        for",
        "float score = 0.0f;\n        for",
        _WRONG,
    ),
    Bug(
        "shuffle in a branch",
        _PARTNER,
        f"float other_low = 0; if (lane < apart) other_low = {_PARTNER[24:]}",
        (Kind.INACTIVE_LANE, Kind.SIMDGROUP),
    ),
    Bug(
        "lanes leave the loop one by one",
        "        for (ushort apart = 16",
        "        if (column == n_columns) break;\n        for (ushort apart = 16",
        (Kind.INACTIVE_LANE, Kind.SIMDGROUP),
    ),
    Bug(
        "writes to an input",
        "last[own + victim] = step;",
        "held_until[own + victim] = step;",
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
