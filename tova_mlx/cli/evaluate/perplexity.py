"""tova-mlx eval perplexity."""

import click


@click.command(short_help="Perplexity of a long text")
def perplexity() -> None:
    """Perplexity of a long text"""
