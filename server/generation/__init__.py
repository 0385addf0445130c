"""A request while it runs: admission, one engine request per choice, text, and the stream to the client.

Whatever ends it leaves the same `async with`. Begin with `generation.Generation`; `streaming` delivers it.
"""
