"""Every error a user can meet; each message is one sentence: what, the value, what to do.

AgentError
  ConfigError           a flag, environment variable, file or request field is wrong (exit 2)
  BundleError           the bundle is missing, damaged or of another version
  GenerationError       drawing on the device failed
  Cancelled             the user stopped the work (exit 130)
  OutputError           the picture could not be written
  LedgerError           the budget's ledger cannot be read or written
  PictureError          a picture that is to be recognised cannot be read
  HistoryError          a client's history cannot be read or written
  CloudError            the cloud did not answer with a picture
    Unreachable           nobody answers there, or the connection broke
    Refused               the server declined, now or for this request
    DeadlineExceeded      the picture did not come in time
    Misbehaved            the server answered with something that is not a picture
    OverBudget            the budget leaves no room for a picture, so nobody was asked
"""

REBUILD = "run `python -m export` to write it again"  # what to do about most of BundleError


class AgentError(Exception):
    """Anything the agent says to a user in one sentence."""


class ConfigError(AgentError):
    """A flag, environment variable, configuration file or request field is wrong."""


class BundleError(AgentError):
    """The bundle is missing, damaged or of another version."""


class GenerationError(AgentError):
    """Drawing on the device failed."""


class Cancelled(AgentError):
    """The user stopped the work."""


class OutputError(AgentError):
    """The picture could not be written."""


class LedgerError(AgentError):
    """The budget's ledger cannot be read or written."""


class PictureError(AgentError):
    """A picture that is to be recognised cannot be read."""


class HistoryError(AgentError):
    """A client's history cannot be read or written."""


class CloudError(AgentError):
    """The cloud did not answer with a picture.

    `maybe_drawn`: it may have drawn one all the same, and then that has to be paid for.
    """

    def __init__(self, message: str, *, maybe_drawn: bool = True) -> None:
        super().__init__(message)
        self.maybe_drawn = maybe_drawn


class Unreachable(CloudError):
    """Nobody answers at the address, or the connection broke."""


class Refused(CloudError):
    """The server declined the request."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, maybe_drawn=False)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(CloudError):
    """The picture did not come before the deadline."""


class Misbehaved(CloudError):
    """The server answered with something that is not a picture."""


class OverBudget(CloudError):
    """The budget leaves no room for a picture, so nobody was asked."""
