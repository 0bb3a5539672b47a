"""The tests, which mirror the package; `python -m pytest` runs them."""
