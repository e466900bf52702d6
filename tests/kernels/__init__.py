"""Tests of s2srm_kernels. naive: what every operation is compared with."""
