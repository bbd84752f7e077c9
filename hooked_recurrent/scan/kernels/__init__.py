"""The recurrence as Triton kernels; the tests run them in Triton's interpreter and compile them for GPUs that are not there."""
