"""Decodes latents to images and writes them to files."""
