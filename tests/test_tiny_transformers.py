"""Every transformer of `tiny_transformers.py` as a module of one's own: export, and the steps of its graphs."""
