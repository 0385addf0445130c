"""The clients that people have, each in an environment of its own, against a real server on the default model.

`python -m tests.clients` installs them below build/clients, runs the examples, and writes docs/clients.md.
"""
