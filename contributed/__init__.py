"""Attention kernels in NKI; each file holds one family and runs as its own check."""
