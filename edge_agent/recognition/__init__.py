"""Recognition that adapts to a client's own unlabelled pictures, which never leave the device."""
