"""What is wrong with samples, beside real images."""
