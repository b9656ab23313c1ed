"""Drawing on the device: samplers in numpy and the loop from a prompt to a picture."""
