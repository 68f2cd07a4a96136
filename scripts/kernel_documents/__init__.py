"""The pages of docs/kernels: what the compiled code says of each kernel, and what is predicted from it."""
