"""What a bounded cache costs in quality: the measurements behind `tova-mlx eval`."""
