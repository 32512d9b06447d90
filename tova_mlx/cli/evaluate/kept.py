"""tova-mlx eval kept."""

import click


@click.command(short_help="Which tokens are kept")
def kept() -> None:
    """Which tokens are kept"""
