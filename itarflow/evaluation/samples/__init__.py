"""Samples: generated once, denoised in several ways, kept."""
