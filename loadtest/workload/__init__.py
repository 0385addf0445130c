"""What is asked: when requests arrive, how long they and their answers are, and what they say. Knows no server."""
