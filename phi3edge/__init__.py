"""phi3edge: puts a Phi-3 checkpoint on a phone or a PC, and proves that it still is the same model."""

__version__ = "0.1.0"
