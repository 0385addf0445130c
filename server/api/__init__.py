"""The routes, one file per endpoint.

Never keeps state: that is `server.state`. Begin with `completions` and `chat`, which end in `admit_request`.
"""
