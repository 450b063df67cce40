"""The LLaMA itself: config (shapes by name), rope, attention, block, llama, init."""
