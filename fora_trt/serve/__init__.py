"""Serves bundles over HTTP with Ray Serve: the API of OpenAI for images, limits, metrics, and one replica per model.

`triton` writes a model for NVIDIA's server instead, and `triton_model` runs in it; they need no Ray.

Only this package imports Ray, and only when an application is built or started.
"""
