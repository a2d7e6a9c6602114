"""Read pickles without importing or calling anything that they name."""
