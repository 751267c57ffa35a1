"""Fifth stage: the denoiser that alternates engines, and the sampling loop around it."""
