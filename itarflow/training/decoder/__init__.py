"""A VAE's decoder, fine-tuned for noisy codes."""
