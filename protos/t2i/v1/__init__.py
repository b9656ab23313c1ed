"""Version 1 of the wire: `image_generation.proto` and the code generated from it."""
