"""A step as one program of operations, and the team of threads that works it off."""
