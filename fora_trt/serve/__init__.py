"""Serves bundles over HTTP with Ray Serve: the API of OpenAI for images, limits, metrics, and one replica per model.

Only this package imports Ray, and only when an application is built or started.
"""
