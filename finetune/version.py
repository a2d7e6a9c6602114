"""The version of the toolkit, kept apart so that builds read it without importing anything."""

__version__ = "0.1.0"
