"""Our own checks, run on somebody's model: what is silently wrong with it, if anything."""
