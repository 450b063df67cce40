"""Documents to vocabulary: train, load, encode, and the chat template in its sandbox."""
