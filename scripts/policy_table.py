"""Prints the documentation's table of policies, made of the policies; --write puts it
there.

    python scripts/policy_table.py [--write]
"""

import sys

from common import write_block

from tova_mlx import POLICIES, Policy


def table() -> str:
    """Markdown: what each policy keeps, ranks by and reads, and where it is from."""
    lines = [
        "| `policy` | keeps | ranks by | victims | options | source |",
        "|---|---|---|---|---|---|",
    ]
    for name, policy in POLICIES.items():
        options = ", ".join(f"`{o}`" for o in policy.options or ()) or "–"
        per = f"one per {policy.granularity}" if policy.bounded else "none"
        per = per.replace("per head", "per KV head")
        cells = (f"`{name}`", policy.keeps, _ranks_by(policy), per, options)
        lines.append(f"| {' | '.join(cells)} | {_linked(policy.source)} |")
    return "\n".join(lines)


def _ranks_by(policy: Policy) -> str:
    if not policy.bounded:
        return "–"
    if policy.reads_attention:
        norm = " × norm of the value" if policy.value_weighted else ""
        return f"attention{norm}, memory {policy.memory:g}"
    return "age" if policy.score is None else "its own score"


def _linked(source: str) -> str:
    words = [w.strip(",;:") for w in source.split()]
    for word in words:
        if word[:4].isdigit() and word[4:5] == ".":
            link = f"[{word}](https://arxiv.org/abs/{word})"
            source = source.replace(word, link)
    return source.replace("arXiv ", "")


if __name__ == "__main__":
    print(table())
    if "--write" in sys.argv[1:]:
        write_block("policies", table())
