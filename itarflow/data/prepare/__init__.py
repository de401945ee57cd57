"""Data sets made of other ones, once: cropped images, and codes of a VAE."""
