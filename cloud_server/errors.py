"""Every error a user of the server can meet; each message is one sentence with what to do.

ServerError
  ConfigError           a flag, environment variable or config.toml is wrong (exit 2)
  ModelError            the model cannot be loaded
  DrawError             the model did not draw this picture
  DataError             a file of prompts, metrics or labels cannot be used
"""


class ServerError(Exception):
    """Anything the server says to its user in one sentence."""


class ConfigError(ServerError):
    """A flag, environment variable or configuration file is wrong."""


class ModelError(ServerError):
    """The model cannot be loaded."""


class DrawError(ServerError):
    """The model did not draw this picture."""


class DataError(ServerError):
    """A file of prompts, metrics or labels cannot be used."""
