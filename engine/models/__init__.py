"""Decoder models: our own layers, and the layers of transformers for what we have not written.

Never reads files, and never keeps a cache. Begin with `model.Model` (what a runner asks of one) and `registry.MODELS`;
`llama` is the family that most others vary.
"""
