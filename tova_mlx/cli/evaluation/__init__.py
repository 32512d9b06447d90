"""tova-mlx eval: quality for several policies and sizes, in one run each."""

import click

from .kept import kept
from .longrange import longrange
from .needle import needle
from .perplexity import perplexity


@click.group(name="eval", short_help="Quality for several policies and sizes")
def evaluation() -> None:
    """Quality for several policies and sizes in one run; `full` is always a row

    Example: tova-mlx eval perplexity novel.txt --out results/novel
    """


evaluation.add_command(perplexity)
evaluation.add_command(needle)
evaluation.add_command(longrange)
evaluation.add_command(kept)
