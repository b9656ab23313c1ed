"""What a router is worth: its cost-quality curve beside those of simpler ways to choose."""
