"""The scenarios, one a file, each with what has to hold at its top. None imports another."""
