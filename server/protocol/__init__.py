"""The JSON of requests and replies: fields, limits, and what OpenAPI says of them.

Never runs a request. Begin with `request_fields` (completions, and what all bodies share), `chat_fields`, `responses`.
"""
