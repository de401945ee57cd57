"""How far samples are from real images: features, distances, scores."""
