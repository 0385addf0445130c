"""What the compiled operations are made of: vectors, register tiles, memory, number formats."""
