"""The building blocks of the compiled operations: vectors, register tiles, memory, number formats."""
