"""A small checkpoint, two small picture sets, and the main job on them."""
