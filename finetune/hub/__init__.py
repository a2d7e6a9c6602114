"""Public checkpoints by name or URL: catalog, downloads, and their folder."""
