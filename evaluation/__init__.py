"""What a model loses with FlashPrefill: `python -m evaluation`."""
