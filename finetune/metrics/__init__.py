"""How far generated images are from real ones, in feature spaces that need no download."""
