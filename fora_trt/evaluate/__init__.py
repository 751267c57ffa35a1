"""Last stage: measures latency and image quality with caching, and compares the graphs with the PyTorch module."""
