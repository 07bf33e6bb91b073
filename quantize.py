"""Number formats of cached keys and values: the library's."""

from selective_kv.formats import INT8, Format, dequantize, hadamard, quantize, rotate

__all__ = ["INT8", "Format", "dequantize", "hadamard", "quantize", "rotate"]
