"""What passes between the server process and the engine process: typed messages, their framing, the in-flight record.

Never starts, ends or supervises a process. Begin with `messages` (what is said), then `framing` (how it is carried);
`inflight_record` says in shared memory which requests were in a step when a process died.
"""
