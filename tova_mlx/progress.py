"""One bar for all long work, on stderr: how far, how fast, how long still."""

import sys
from typing import Any

# What is said beside the bar, in characters: a task and a setting.
_WIDTH = 24


class Bar:
    """A bar with rate and time left; nothing where stderr is not a terminal.

    It goes at the end of the `with` block.

    Args:
        total: how much there is to do, in `unit`; 0: told later, by `reached`.
        label: what is done first.
        delay: seconds of work before the bar is shown.
    """

    def __init__(
        self,
        total: int = 0,
        label: str = "Reading",
        *,
        unit: str = "tokens",
        delay: float = 0.0,
    ):
        # Not before: `--help` has no use for it.
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            desc=_padded(label),
            unit=f" {unit}",
            delay=delay,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=False,
            # The mean speed: parts of the work differ in theirs.
            smoothing=0,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} "
            "[{rate_fmt}, {remaining} left]",
        )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, n: int) -> None:
        """Count n more as done."""
        self._bar.update(n)

    def reached(self, done: int, total: int) -> None:
        """Count `done` of `total` as done, the bar gone when that is all of it.

        For mlx-lm's `prompt_progress_callback`.
        """
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()

    def say(self, *what: Any) -> None:
        """Name what is done now."""
        self._bar.set_description_str(_padded(" ".join(map(str, what))))


def _padded(label: str) -> str:
    return f"{label:{_WIDTH}}"
