"""tova-mlx eval: quality for several policies and sizes, in one run each."""

import click

from .kept import kept
from .longrange import longrange
from .needle import needle
from .perplexity import perplexity


@click.group(name="eval", short_help="Quality for several policies and sizes")
def evaluate() -> None:
    """Quality for several policies and sizes in one run; `full` is always a row

    Example: tova-mlx eval perplexity novel.txt --out results/novel
    """


evaluate.add_command(perplexity)
evaluate.add_command(needle)
evaluate.add_command(longrange)
evaluate.add_command(kept)
