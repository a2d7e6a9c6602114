"""Distances between generated and real images, by default in feature spaces that need no download."""
