"""How likely images are: bits per dimension and bounds of them."""
