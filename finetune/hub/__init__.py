"""Public checkpoints by name or URL: the catalog, downloads, and the folder that keeps them."""
