"""Names our cache classes where mlx-lm's `load_prompt_cache` looks them up."""

from mlx_lm.models import cache as mlx_lm_cache


def install(*kinds: type) -> None:
    """Let mlx-lm find these classes by their names."""
    for kind in kinds:
        setattr(mlx_lm_cache, kind.__name__, kind)


def uninstall(*kinds: type) -> None:
    """Let mlx-lm no longer find these classes."""
    for kind in kinds:
        if getattr(mlx_lm_cache, kind.__name__, None) is kind:
            delattr(mlx_lm_cache, kind.__name__)
