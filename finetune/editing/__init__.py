"""Images, videos, blends and projections made with a checkpoint."""
