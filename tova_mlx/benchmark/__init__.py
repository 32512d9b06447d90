"""Speed and memory of caches over context lengths, this package's and mlx-lm's own."""
