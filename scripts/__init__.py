"""What users run: each file by itself, `python scripts/NAME.py`."""
