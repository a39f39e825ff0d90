from .reading import ImageError, read_digit

__all__ = ["ImageError", "read_digit"]
