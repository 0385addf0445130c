"""The server's end of the border: starts the engine process, keeps it alive, and replays what a crash interrupted.

Runs in the server process, in its event loop, and never imports torch. Begin with `client.EngineClient`; `supervisor`
restarts, `journal` remembers what a replay needs, `deaths` decides which request was at fault.
"""
