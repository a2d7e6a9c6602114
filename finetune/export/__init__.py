"""Export networks as files for other programs, and verify the files."""
