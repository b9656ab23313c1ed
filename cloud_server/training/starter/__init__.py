"""The starter models: small models trained from nothing on scenes we draw ourselves."""
