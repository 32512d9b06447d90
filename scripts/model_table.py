"""Tries every model of the installed mlx-lm, tiny, and prints README's table of them.

python scripts/model_table.py [--json] [--write]

The contract is that of tests/contract.py. --json: the last line is an object with
`families`, `passed` and `refused` (name: reason), of the policy tova. --write puts the
table into the README.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import block, write_block  # noqa: F401 - for the test

ROOT = Path(__file__).parents[1]
# One for each thing that a policy can ask of a model: attention, none, values.
POLICIES = ("tova", "streaming", "fade")

Outcomes = Mapping[tuple[str, str], Any]


def summary(outcomes: Outcomes) -> dict[str, Any]:
    """Families found, passed and refused with tova."""
    tova = {n: o for (n, p), o in sorted(outcomes.items()) if p == "tova"}
    return {
        "families": list(tova),
        "passed": [n for n, o in tova.items() if o.reason is None],
        "refused": {n: o.reason for n, o in tova.items() if o.reason is not None},
    }


def counts(summary: dict[str, Any]) -> str:
    found, passed, refused = (
        len(summary[k]) for k in ("families", "passed", "refused")
    )
    return f"mlx-lm's model files: {found} found, {passed} passed, {refused} refused"


def table(outcomes: Outcomes) -> str:
    """Markdown: what is bounded in which model files, and which are refused."""
    bounded, no_values, nothing = [], [], []
    for name in summary(outcomes)["passed"]:
        if outcomes[name, "fade"].reason is not None:
            no_values.append(name)
        else:
            (bounded if outcomes[name, "tova"].bounded else nothing).append(name)
    rows = [
        ("every layer without a window or a state of its own", bounded),
        (
            "the same, but not with `vatp` and `fade`: what is attended to is not what "
            "is stored",
            no_values,
        ),
        ("nothing: constant in memory as it is", nothing),
    ]
    lines = ["| bounded | model files |", "|---|---|"]
    lines += [f"| {what} | {_names(names)} |" for what, names in rows]
    lines += ["", "| refused | why |", "|---|---|"]
    for name, reason in summary(outcomes)["refused"].items():
        can = outcomes[name, "streaming"].reason is None
        but = " (`window` and `streaming` work)" if can else ""
        reason = reason.removeprefix(f"mlx_lm.models.{name} ").partition(". Use ")[0]
        reason = reason.replace("mlx_lm.models.", "")
        lines.append(f"| `{name}` | {reason}{but} |")
    return "\n".join([f"{counts(summary(outcomes))}.", "", *lines])


def _names(names: list[str]) -> str:
    return ", ".join(f"`{n}`" for n in names)


def _run() -> Outcomes:
    sys.path.insert(0, str(ROOT / "tests"))
    import zoo
    from contract import outcome

    outcomes = {}
    for name in zoo.families():
        for policy in POLICIES:
            outcomes[name, policy] = outcome(name, policy)
        print(name, file=sys.stderr)
    return outcomes


if __name__ == "__main__":
    found = _run()
    print(table(found))
    if "--write" in sys.argv[1:]:
        write_block("models", table(found))
    if "--json" in sys.argv[1:]:
        print(json.dumps(summary(found)))
