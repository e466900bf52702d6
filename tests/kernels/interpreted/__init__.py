"""Tests of the Triton engine, whose kernels run in Triton's interpreter; see conftest."""
