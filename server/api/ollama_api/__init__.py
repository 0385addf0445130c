"""Ollama's API: /api/chat, /api/generate and what its clients ask first. Nothing outside of this folder knows it.

A request becomes a chat (`conversation`), and what is generated becomes lines of JSON (`writer`). Begin with `routes`.
"""
