"""What led to decisions of design; run from the checkout, as `python -m research.NAME`."""
