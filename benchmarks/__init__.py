"""What measures speed; run from the checkout, as `python -m benchmarks.NAME`."""
