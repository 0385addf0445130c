"""The command line: serve, plan, doctor. The only place of the server that may run the engine's code itself."""
