"""The demonstration that `make demo` runs: both sides draw, then the cloud goes away."""
