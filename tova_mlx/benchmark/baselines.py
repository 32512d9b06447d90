"""The names of what policies are compared with; known without MLX."""

from ..evaluation.results import Setting

# mlx-lm's cache without a limit.
FULL = Setting("full", None)
# mlx-lm's RotatingKVCache, which keeps the newest tokens and the first few.
ROTATING = "rotating"
KEEP = 4
