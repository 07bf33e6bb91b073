"""Weights in 8 and 4 bits: their numbers, the modules that hold them, and what multiplies by them without a GPU."""
