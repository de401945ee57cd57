"""Figures of a checkpoint: its samples, how far they are from real images, how likely those are, what is wrong."""
