"""`python -m tova_mlx` is `tova-mlx`."""

from .cli import main

main(prog_name="tova-mlx")
