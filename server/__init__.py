"""Text and HTTP. Never imports torch. The order of the rooms is in `tests/test_structure.py`: imports go one way."""
