"""How far generated pictures are from real ones, in feature spaces that need no download."""
