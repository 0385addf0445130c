"""OpenAI's Responses API: its bodies, its items, and its events. Nothing outside of this folder knows any of them.

A request becomes a chat (`conversation`), and what is generated becomes items (`items`) and events (`writer`). Begin
with `routes`.
"""
