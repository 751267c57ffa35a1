"""Every transformer of `tiny_transformers.py`, exported as a module of one's own."""
