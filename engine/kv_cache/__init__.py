"""KV blocks: who owns them, which prefixes they hold, how keys and values are stored in them, and the memory behind it.

Never computes keys or values. Begin with `manager.KVCacheManager` (what the scheduler asks), `storage.KVCache` (the
tensors) and `codec.KVCodec` (what their bytes mean); `groups` are layers that need the same blocks, `block_pool` counts
references.
"""
