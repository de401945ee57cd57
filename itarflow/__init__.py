"""Normalizing flows that generate images."""
