"""What the operations should compute, written as plain loops in float64 that share no code with the packages."""
