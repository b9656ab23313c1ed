"""ICIIA: recognition that adapts to a client's own unlabelled pictures, trained once."""
