"""Runs and checks Metal kernels on Linux, see README.md."""

from .build import missing, skip_reason
from .findings import Finding, Kind, MSLError
from .kernel import Kernel, Options, checked_kernels, install, uninstall
from .run import Counts

__all__ = [
    "Counts",
    "Finding",
    "Kernel",
    "Kind",
    "MSLError",
    "Options",
    "checked_kernels",
    "install",
    "missing",
    "skip_reason",
    "uninstall",
]
