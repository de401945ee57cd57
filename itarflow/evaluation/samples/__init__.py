"""Samples: generated once, denoised in several variants, stored."""
