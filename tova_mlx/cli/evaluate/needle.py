"""tova-mlx eval needle."""

import click


@click.command(short_help="Retrieval of a fact hidden in a text")
def needle() -> None:
    """Retrieval of a fact hidden in a text"""
