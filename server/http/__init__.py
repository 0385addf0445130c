"""Connections and requests before any route: parsing, limits on what a client may send and hold, keys, headers.

Never reads a body's meaning. Begin with `http_protocol` (the connection) and `middleware` (the request).
"""
