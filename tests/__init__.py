"""The tests: folders mirror the packages, `system` runs the whole, `support` is what tests share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the repository
