"""The policies: one file each, and the registry that knows them by name."""

from .base import POLICY_OPTIONS, Granularity, Policy, Rule
from .registry import (
    GROUP,
    POLICIES,
    RECALL_BLOCK,
    register_policy,
    resolve_options,
)

__all__ = [
    "GROUP",
    "POLICIES",
    "POLICY_OPTIONS",
    "RECALL_BLOCK",
    "Granularity",
    "Policy",
    "Rule",
    "register_policy",
    "resolve_options",
]
