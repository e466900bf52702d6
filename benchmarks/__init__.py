"""Measurements of s2srm_kernels and of its peers: see benchmarks/README.md."""
