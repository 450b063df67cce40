"""Tokens out of a model: sampling, the KV cache, and the engine that runs requests."""
