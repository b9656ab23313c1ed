"""All training: quality labels, the router predictor and the starter models. PyTorch."""
