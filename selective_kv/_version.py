"""The library's version, readable without importing torch."""

__version__ = "0.3.0"
