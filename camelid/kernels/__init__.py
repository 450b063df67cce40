"""The fast paths: one native library with a plain C ABI, used where it is built; a reference always works."""
