"""The denoising loop, classifier-free guidance, scheduler steps as coefficients, and the conditioning inputs."""
