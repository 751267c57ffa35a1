"""Fifth stage: the denoiser, which alternates the full and the reuse engine along a schedule."""
