"""The one error of exporting; its message is a sentence for the user."""


class ExportError(Exception):
    """Nothing was exported: what happened, the value, the next step."""
