"""Anthropic's Messages API: its bodies, its content blocks, its events and its errors, which nothing outside knows.

A request becomes a chat (`conversation`), and what is generated becomes blocks and events (`writer`). Begin with
`routes`.
"""
