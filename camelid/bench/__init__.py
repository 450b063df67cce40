"""Side by side against peers: each in its own process and environment, in turns, on the same input."""
