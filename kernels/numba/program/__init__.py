"""A forward pass as a program, a list of compiled operations, and the team of threads that runs it."""
