"""One request to a server, timed to what became of it. Begin with `client.py`. Draws no conclusions."""
