"""The server's side of the engine: starts its process, keeps it alive, and replays requests after a crash.

Runs in the server process, in its event loop, and never imports torch. Begin with `client.EngineClient`; `supervisor`
restarts, `journal` remembers what a replay needs, `deaths` decides which request was at fault.
"""
