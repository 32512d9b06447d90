"""tova-mlx eval longrange."""

import click


@click.command(short_help="Summaries, answers and stories over long texts")
def longrange() -> None:
    """Summaries, answers and stories over long texts"""
