"""Documents to packed token shards, in an order that is a pure function of (seed, position)."""
