"""The serving half of Clarifier: HTTP in, defended answers out."""

__version__ = "0.1.0"
"""As in `pyproject.toml`."""
