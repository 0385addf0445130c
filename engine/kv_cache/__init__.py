"""KV blocks: who owns them, which prefixes they hold, and the memory behind them.

Never computes keys or values. Begin with `manager.KVCacheManager` (what the scheduler asks) and `storage.KVCache` (the
tensors); `block_pool` counts references.
"""
