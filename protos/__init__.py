"""What the device and the cloud say to each other: the gRPC contract and code generated from it."""
