"""Progress on the terminal, and one self-contained HTML page for what is better seen than read."""
