"""Bugs for the eviction kernels: what tests/mslcheck must find of each."""

from mslcheck.findings import Kind
from mslcheck.seeded import Bug

_WRONG, _RACE, _BOUNDS = (Kind.WRONG,), (Kind.RACE,), (Kind.OUT_OF_BOUNDS,)
_LINT, _COMPILE = (Kind.LINT,), (Kind.COMPILE,)
_NOT_WRITTEN = (Kind.NOT_WRITTEN, Kind.UNINITIALISED)
# Who reads too early, reads what another thread has or has not written yet.
_EARLY = (Kind.RACE, Kind.UNINITIALISED)

_BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
_HEADS = f"{_BARRIER}\n    for (int h = tid; h < HEADS"
_COLUMNS = f"{_BARRIER}\n\n    float lowest"
_BEST = f"{_BARRIER}\n    for (int s = 0"
_EVICTION = f"}}\n    {_BARRIER}\n#else"
_SHUFFLE = "const float other_score = simd_shuffle_xor(lowest, apart);"
_OWN = "size_t(choice) * n_columns;"


def _without(old: str) -> str:
    return old.replace(_BARRIER, "")


BUGS = [
    Bug("no barrier after the flags", f"{_BARRIER}\n#define", "\n#define", _EARLY),
    Bug("no barrier before the heads", _HEADS, _without(_HEADS), _EARLY),
    Bug("no barrier before the columns", _COLUMNS, _without(_COLUMNS), _EARLY),
    Bug("no barrier before the best", _BEST, _without(_BEST), _EARLY),
    Bug("no barrier after an eviction", _EVICTION, _without(_EVICTION), _RACE),
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
        "threads without a column return",
        "for (int step = 0;",
        "if (tid >= n_columns) return;\n  for (int step = 0;",
        (Kind.BARRIER, Kind.INACTIVE_LANE, *_EARLY),
    ),
    Bug(
        "a column too many",
        "c < n_seen; c += THREADS",
        "c <= n_seen; c += THREADS",
        (*_EARLY, Kind.OUT_OF_BOUNDS),
    ),
    Bug("the own column not seen", "n_held + step + 1", "n_held + step", _WRONG),
    Bug("parts overlap", "item % PARTS * 32 + lane", "lane", _WRONG),
    Bug("parts leave columns out", "item % PARTS * 32", "item % PARTS * 64", _WRONG),
    Bug("evicted columns attract", "TOVA_HELD(c) && x", "x", _WRONG),
    Bug(
        "evicted columns are evicted again", "if (!TOVA_HELD(c)) continue;", "", _WRONG
    ),
    Bug("hidden columns counted", " && x != -INFINITY", "", _WRONG),
    Bug("NaN hidden", "x != -INFINITY", "x > -INFINITY", _WRONG),
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
    Bug("norms of another head", "head / GROUP", "head", (*_BOUNDS, *_WRONG)),
    Bug("sinks past the heads", " % n_heads]", "]", _BOUNDS),
    Bug(
        "sinks not in the sum",
        "SINKS ? metal::exp(learned - highest) : 0.0f",
        "0.0f",
        _WRONG,
    ),
    Bug("memory that never fades", "memory[0] * new_scores", "new_scores", _WRONG),
    Bug(
        "memory forgotten",
        "MEMORY ? memory[0] * new_scores[own + c] + received",
        "false ? received",
        _WRONG,
    ),
    Bug("a recent token too few", "- n_recent)", "- n_recent + 1)", _WRONG),
    Bug("recent as of the last step", " - (n_steps - 1 - step) - n", " - n", _WRONG),
    Bug(
        "a first token too few",
        "position >= n_sinks",
        "position >= n_sinks - 1",
        _WRONG,
    ),
    Bug("evicts from the start", "step >= first_evicting", "step >= 0", _WRONG),
    Bug(
        "eviction noted a step late",
        "last[own + victim] = step;",
        "last[own + victim] = step + 1;",
        _WRONG,
    ),
    Bug("flag of another column", "1u << (victim & 31)", "1u << (victim & 15)", _WRONG),
    Bug(
        "flags not all cleared",
        "w < (n_columns + 31) / 32",
        "w < n_columns / 32",
        (Kind.UNINITIALISED,),
    ),
    Bug("flags past the array", "evicted[MAX_COLUMNS / 32]", "evicted[1]", _BOUNDS),
    Bug(
        "best of too few simdgroups",
        "best_score[SIMDGROUPS]",
        "best_score[SIMDGROUPS - 1]",
        _BOUNDS,
    ),
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
    Bug("columns held not noted", "last[own + c] = n_steps;", "", _NOT_WRITTEN),
    Bug("a step's scores not noted", "if (nth >= 0)", "if (nth > 0)", _NOT_WRITTEN),
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
