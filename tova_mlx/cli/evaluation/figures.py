"""Figures with their standard errors, as the tables of the evaluations print them."""


def pm(value: float, error: float | None, digits: int, sign: str = "") -> str:
    """A value, ± its error if that is known."""
    text = f"{value:{sign}.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def percent(ratio: float | None, error: float | None) -> str:
    """The change that a ratio is; nothing if there is none."""
    if ratio is None:
        return ""
    return f"{pm(100 * (ratio - 1), error and 100 * error, 1, '+')} %"
