"""Bugs for the eviction kernels: what tests/mslcheck must find of each."""

from mslcheck.findings import Kind
from mslcheck.seeded import Bug

_WRONG, _RACE, _BOUNDS = (Kind.WRONG,), (Kind.RACE,), (Kind.OUT_OF_BOUNDS,)
_LINT, _COMPILE = (Kind.LINT,), (Kind.COMPILE,)
_NOT_WRITTEN = (Kind.NOT_WRITTEN, Kind.UNINITIALISED)
# Who reads too early, reads what another thread has or has not written yet.
_EARLY = (Kind.RACE, Kind.UNINITIALISED)

_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
_HEADS = f"{_BARRIER}\n  for (int h = tid; h < HEADS"
_COLUMNS = f"{_BARRIER}\n\n  float lowest"
_BEST = f"{_BARRIER}\n    for (int s = 0"
_SHUFFLE = "const float other_score = simd_shuffle_xor(lowest, apart);"
_OWN = "size_t(choice) * n_columns;"
_MEAN = f"{_BARRIER}\n  for (int d = tid"
_DISTANCES = f"{_BARRIER}\n\n  float of_mean"


def _without(old: str) -> str:
    return old.replace(_BARRIER, "")


STEP = [
    Bug("no barrier before the heads", _HEADS, _without(_HEADS), _EARLY),
    Bug("no barrier before the columns", _COLUMNS, _without(_COLUMNS), _EARLY),
    Bug("no barrier before the best", _BEST, _without(_BEST), _EARLY),
    Bug(
        "barrier for device memory only",
        _BEST,
        _BEST.replace("mem_threadgroup", "mem_device"),
        _RACE,
    ),
    Bug(
        "simdgroup_barrier for threadgroup_barrier",
        _COLUMNS,
        _COLUMNS.replace("threadgroup_barrier", "simdgroup_barrier"),
        _EARLY,
    ),
    Bug(
        "barrier in a branch",
        _COLUMNS,
        f"if (tid < HEADS) {_COLUMNS}",
        (*_EARLY, Kind.BARRIER),
    ),
    Bug(
        "a column too many",
        "c < n_columns; c += PARTS",
        "c <= n_columns; c += PARTS",
        (*_EARLY, *_WRONG, Kind.OUT_OF_BOUNDS),
    ),
    Bug("parts overlap", "item % PARTS * 32 + lane", "lane", _WRONG),
    Bug("parts leave columns out", "item % PARTS * 32", "item % PARTS * 64", _WRONG),
    Bug("hidden columns counted", "if (x != -INFINITY) {", "{", _WRONG),
    Bug("NaN hidden", "x != -INFINITY", "x > -INFINITY", _WRONG),
    Bug("logits scaled once only", "logits[at]) * scale", "logits[at])", _WRONG),
    Bug("logits not scaled", "logits[line + c]) * scale", "logits[line + c])", _WRONG),
    Bug(
        "ties to the newest",
        "other_position < position",
        "other_position > position",
        _WRONG,
    ),
    Bug(
        "ties to the first slot",
        "other_position < position",
        "other_column < column",
        _WRONG,
    ),
    Bug(
        "the best is evicted",
        "other_score < score ||",
        "other_score > score ||",
        _WRONG,
    ),
    Bug("sum not rescaled", "sum * metal::exp(high - higher)", "sum", _WRONG),
    Bug("lanes not rescaled", ": sum * metal::exp(high - highest)", ": sum", _WRONG),
    Bug(
        "parts not rescaled",
        ": part_sum[p] * metal::exp(high - highest)",
        ": part_sum[p]",
        _WRONG,
    ),
    Bug("maximum of one lane", "simd_max(high)", "high", _WRONG),
    Bug("a sum and no mean", "received *= 1.0f / float(HEADS);", "", _WRONG),
    Bug("NaN remembered", "if (tova_is_nan(received)) received = 0.0f;", "", _WRONG),
    Bug(
        "norms of another head",
        "NORMS + h / GROUP",
        "NORMS + h",
        (*_BOUNDS, *_EARLY, *_WRONG),
    ),
    Bug("sinks past the heads", " % n_heads]", "]", _BOUNDS),
    Bug(
        "sinks not in the sum",
        "SINKS ? metal::exp(learned - highest) : 0.0f",
        "0.0f",
        _WRONG,
    ),
    Bug("memory that never fades", "factors[1] * before", "before", _WRONG),
    Bug(
        "memory forgotten",
        "MEMORY ? factors[1] * before + received",
        "false ? received",
        _WRONG,
    ),
    Bug(
        "the newest has the score of its slot", "MEMORY && c != fresh", "MEMORY", _WRONG
    ),
    Bug(
        "the newest has the position of its slot",
        "c == fresh ? newest_position : positions[own + c]",
        "positions[own + c]",
        _WRONG,
    ),
    Bug(
        "the newest has the norm of its slot",
        "c == fresh ? fresh_norm[k] : value_norms[at]",
        "value_norms[at]",
        _WRONG,
    ),
    Bug("a square for a norm", "metal::sqrt(square)", "square", _WRONG),
    Bug("the norm of one lane", "square = simd_sum(square);", "", _WRONG),
    Bug(
        "a part of the newest value",
        "d = lane; d < width; d += 32",
        "d = lane; d < 32; d += 32",
        _WRONG,
    ),
    Bug("a recent token too few", "- n_recent)", "- n_recent + 1)", _WRONG),
    Bug(
        "a first token too few",
        "position >= n_sinks",
        "position >= n_sinks - 1",
        _WRONG,
    ),
    Bug(
        "best of too few simdgroups",
        "best_score[SIMDGROUPS]",
        "best_score[SIMDGROUPS - 1]",
        _BOUNDS,
    ),
    Bug(
        "shuffle in a branch",
        _SHUFFLE,
        f"if (lane < apart) {{ {_SHUFFLE} }} {_SHUFFLE}",
        (Kind.INACTIVE_LANE, Kind.SIMDGROUP),
    ),
    Bug("batch rows on top of each other", _OWN, "0;", (*_RACE, *_WRONG)),
    Bug(
        "no victim where nothing is evicted",
        "if (tid == 0) victims[choice] = 0u;",
        "",
        _NOT_WRITTEN,
    ),
    Bug("scores not noted", "new_scores[own + c] = score;", "", _NOT_WRITTEN),
    Bug("positions not noted", "new_positions[own + c] = position;", "", _NOT_WRITTEN),
    Bug(
        "writes to an input",
        "new_scores[own + c] = score;",
        "scores[own + c] = score;",
        _COMPILE,
    ),
    Bug("no address space", "thread float& score", "float& score", _LINT),
    Bug(
        "half for a sum", "float sum = 0.0f;", "half sum = 0.0f;", (*_COMPILE, *_WRONG)
    ),
    Bug("double", "float lowest", "double lowest", _LINT),
    Bug("not ASCII", "// A lane that saw", "// Où a lane saw", _LINT),
]

_PART_OF_KEY = """square += mine[j] * mine[j];
    }
    square = simd_sum(square);
    const bool"""
_DISTANCE = "d < WIDTH ? mine[j] * inverse - mean[d] : 0.0f;"

# Of the choice by scores, of keydiff's scores, and of the copy.
OTHERS = [
    Bug("scores of one head", "score += scores", "score = scores", _WRONG),
    Bug("who is not there", "!PARTLY || held[", "true || held[", _WRONG),
    Bug("there as in the first row", "held[size_t(row) * n_columns", "held[0", _WRONG),
    Bug("keys that are not there", "PARTLY && !held", "false && !held", _WRONG),
    Bug("no barrier before the mean", _MEAN, _without(_MEAN), _EARLY),
    Bug("no barrier before the distances", _DISTANCES, _without(_DISTANCES), _EARLY),
    Bug("keys and no unit keys", "mine[j] * inverse;", "mine[j];", _WRONG),
    Bug("a key of no length counts", "if (!(square > 0.0f)) continue;", "", _WRONG),
    Bug(
        "a key of no length is far",
        "if (!directed) distance = 1.0f + of_mean;",
        "",
        _WRONG,
    ),
    Bug("keys of one simdgroup count", "n += counts[s];", "n = counts[0];", _WRONG),
    Bug(
        "the length of one lane",
        _PART_OF_KEY,
        _PART_OF_KEY.replace("square = simd_sum(square);", ""),
        (*_WRONG, Kind.SIMDGROUP, *_RACE),
    ),
    Bug("distances past the mean", _DISTANCE, "mean[d + 1];", (*_BOUNDS, *_WRONG)),
    Bug("all heads take one slot", "slot[line / per_slot]", "slot[0]", _WRONG),
    Bug(
        "a slot for each head",
        "slot[line / per_slot]",
        "slot[line]",
        (*_BOUNDS, *_WRONG),
    ),
    Bug("part of a row", "+ e % width];", "];", _WRONG),
    Bug("not all rows", "from{i}_shape[0] * heads", "heads", _NOT_WRITTEN),
]

_HEADS_OF_BLOCK = f"{_BARRIER}\n    for (int h = tid; h < HEADS; h += THREADS) {{"
_COLUMNS_OF_BLOCK = f"{_BARRIER}\n\n    float lowest"
_GOES = "- 2.0f * goes[h]"

# Of keydiff's evictions in a block: what to replace, and by what.
BLOCK = [
    Bug(f"block: {old}", old, new, expected)
    for old, new, expected in (
        (_HEADS_OF_BLOCK, _without(_HEADS_OF_BLOCK), _EARLY),
        (_COLUMNS_OF_BLOCK, _without(_COLUMNS_OF_BLOCK), _EARLY),
        ("tid == fresh % THREADS", "tid == 0", _EARLY),
        ("tid == gone % THREADS", "tid == 0", _EARLY),
        ("+ 2.0f * comes[h] +", "+", _WRONG),
        (_GOES, "", _WRONG),
        (f"{_GOES} -", f"{_GOES} +", _WRONG),
        ("centre -= centred[line + gone];", "", _WRONG),
        ("n -= directed[line + gone] ? 1.0f : 0.0f;", "", _WRONG),
        ("directed[line + fresh] ? 1.0f : 0.0f", "1.0f", _WRONG),
        ("if (gone >= 0) product -=", "if (false) product -=", _WRONG),
        ("2.0f * product * inverse[h]", "2.0f * product", _WRONG),
        ("- 2.0f * product * inverse", "- product * inverse", _WRONG),
        ("distance * factor[h]", "distance", _WRONG),
        ("1.0f + of_mean - sum", "0.5f + of_mean - sum", _WRONG),
        ("!dead && free", "free", _WRONG),
        ("newest_of_all - (n_steps - 1 - step)", "newest_of_all", _WRONG),
        ("step < first_evicting", "step < 0", _WRONG),
        ("last[own + victim] = step;", "last[own + victim] = step + 1;", _WRONG),
        ("1u << (victim & 31)", "1u << (victim & 15)", _WRONG),
    )
]

BUGS = [*STEP, *OTHERS, *BLOCK]
