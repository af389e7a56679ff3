"""Exceptions: user errors (exit code 2) and engine failures."""


class UserError(Exception):
    """A user error. The command line prints only its message and exits with code 2."""


class InvalidTensorError(UserError):
    """A weight or an activation contains NaN or Inf; the message names the tensor or the site."""


class EngineError(Exception):
    """An engine that runs exported models failed or does not support a request; the message is the reason."""
