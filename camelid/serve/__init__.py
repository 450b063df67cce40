"""An OpenAI-compatible server over the engine, and its web page."""
