"""Every exception raised on purpose.

A message says who, what was given, why it cannot work and what to do, in one line.
"""

# Characters of a reason: what a damaged file says may have millions.
_LONGEST = 200


def reason_of(error: BaseException) -> str:
    """Return what another error says, in a part of a line that can be shown."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = lines[0][:_LONGEST]
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


class TovaError(Exception):
    """Base class; the command line prints it as one line and exits with 1."""

    @property
    def line(self) -> str:
        """What the command line prints."""
        return f"Error: {' '.join(str(self).split())}"


class OptionError(TovaError, ValueError):
    """An option has a value that cannot work, or that the policy does not read."""


class UnsupportedModelError(TovaError):
    """A model does something that the chosen policy cannot be right with."""


class ModelLoadError(TovaError):
    """A model directory or hub id that cannot be loaded."""


class PromptError(TovaError, ValueError):
    """A prompt that cannot be read or has no tokens."""


class CacheStateError(TovaError):
    """A cache was asked for something that its state does not allow."""


class EvaluationError(TovaError, ValueError):
    """An evaluation was given texts, tasks or a directory that it cannot use."""
