"""What a mutant is."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A mistake: a text that is in the package once, and what takes its place.

    tests: run before those of the area; stays: why no test can tell it from what is
    right, or empty if one must.
    """

    name: str
    area: str
    old: str
    new: str
    tests: tuple[str, ...] = ()
    stays: str = ""
