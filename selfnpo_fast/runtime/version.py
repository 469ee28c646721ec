"""The version of this package, for pyproject.toml and for a checkout that is not installed."""

__version__ = "0.1.0"
