"""Conformance kits: for each protocol of the engine one class, whose tests are the laws of that protocol.

A new implementation subclasses the kit in a test file of its own room and says how it is made:

    class TestTorchAttention(AttentionConformance):
        def make(self, cache: KVCache) -> AttentionBackend:
            return TorchAttention(cache)

What else an implementation may differ in (precision, block sizes, which promises it gives beyond the protocol's) is a
class attribute of the kit, with the protocol's own promise as its value. A test that only one implementation can pass
is no law, and stays in that implementation's file. Kits ask through the protocol alone: a test that looks inside is
none.

Each kit is a module here, named for its protocol, and is not collected itself, because its name does not begin with
`Test`. What kits share to make up cases stands beside this package, in `tests.support`.
"""
