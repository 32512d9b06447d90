"""What a row of an evaluation must say, to be counted, printed and drawn.

Rows come out of files that may have been cut off, merged or edited.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Form: TypeAlias = Mapping[str, Callable[[Any], bool]]

# Of what is measured: no perplexity, and no number of bytes, is larger.
_LARGEST = 1e18


def number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def number_or_none(value: Any) -> bool:
    return value is None or number(value)


def count(value: Any) -> bool:
    return type(value) is int and 0 < value <= _LARGEST


def text(value: Any) -> bool:
    return isinstance(value, str)


def share(value: Any) -> bool:
    return number(value) and 0 <= value <= 1


def numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(number, value))


def named_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(number, value.values()))


_SETTING: Form = {"policy": text, "max_kv_size": number_or_none}
_MEASURED: Form = {
    **_SETTING,
    "unit": text,
    "value": number,
    "stderr": number_or_none,
    "n": count,
}
_LONG: Form = {**_MEASURED, "tokens": number, "cut_tokens": number}
_ANSWERED: Form = {
    **_SETTING,
    "source": number,
    "tokens": number,
    "cut_tokens": number,
}
_KEPT: Form = {
    **_MEASURED,
    "layers": count,
    "layer": number_or_none,
    "counts": named_numbers,
    "lifetimes": named_numbers,
    "first_tokens_stay": numbers,
    "first_token_steps": number,
    "share_newest_half": number_or_none,
}
# By the task of a row.
ROWS: Mapping[str, Form] = {
    "perplexity": _MEASURED,
    "needle": {
        **_MEASURED,
        "value": share,
        "interval": numbers,
        "kind": text,
        "length": count,
        "depth": number,
        "mean_log_probability": number,
        "mean_log_probability_stderr": number_or_none,
        "log_probabilities": numbers,
    },
    "kept": _KEPT,
    "squality": _LONG,
    "qasper": _LONG,
    "story": {**_LONG, "repetition": number},
    "bench": {**_MEASURED, "context": count},
}
# By the task of an answer.
ANSWERS: Mapping[str, Form] = {
    "squality": {**_ANSWERED, "score": number},
    "qasper": {**_ANSWERED, "score": number},
    "story": {**_ANSWERED, "loss": number, "repetition": number},
}
# By unit, more of a benchmark.
_BENCH: Mapping[str, Form] = {
    "decode_ms": dict.fromkeys(
        ("p20", "p80", "bytes_read", "weights_read", "bandwidth", "bound_ms"), number
    )
    | {"ratio_to_bound": number, "bandwidth_is": text},
    "cache_bytes": {"caches": lambda value: isinstance(value, list)},
}


def check(row: dict[str, Any], forms: Mapping[str, Form]) -> None:
    """Raise ValueError for a row without something that its task has.

    One of a task that no form is known for passes.
    """
    task = row.get("task")
    form = forms.get(task) if isinstance(task, str) else None
    if form is None:
        return
    if task == "bench" and isinstance(row.get("unit"), str):
        form = {**form, **_BENCH.get(row["unit"], {})}
    for name, is_right in form.items():
        if name not in row:
            raise ValueError(f"{task} without {name}")
        if not is_right(row[name]):
            raise ValueError(f"{task} with {name} {row[name]!r}")
    for name, value in row.items():
        if not name.startswith(("ratio_to_", "minus_")):
            continue
        if not number_or_none(value):
            raise ValueError(f"{task} with {name} {value!r}")
        error = f"{name.removesuffix('_stderr')}_stderr"
        if name.startswith("minus_") and error not in row:
            raise ValueError(f"{task} without {error}")
    if task == "kept" and row["layer"] is not None:
        _check_kinds(row)


def _check_kinds(row: dict[str, Any]) -> None:
    """Every kind that was counted has a lifetime, and so have all."""
    lacking = {"all", *row["counts"]} - set(row["lifetimes"])
    if lacking or row["lifetimes"]["all"] <= 0:
        raise ValueError("kept with lifetimes of other kinds than it counted")
