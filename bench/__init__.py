"""Yardsticks, not installed with the package: timings beside what the machine can do at best, and
the Triton kernels compiled for GPUs that need not be there. The CSVs keep measurements."""
