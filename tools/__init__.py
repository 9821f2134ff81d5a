"""What those who change this project run, as `python -m tools.NAME` from the checkout."""
