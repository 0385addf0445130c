"""From a name, a directory or a GGUF file to a model with its weights, and the tokenizer's files.

Checks everything that a file claims before anything is built from it. Begin with `loader.load_model`; `source` finds
the files, `checkpoint` reads the config, `gguf` is a room of its own.
"""
