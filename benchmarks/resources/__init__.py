"""What the compiled kernels use of a chip, read without one."""
