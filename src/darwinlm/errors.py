"""What is the user's to fix, as one clear line (what is wrong, where, what to do), and what engines refuse."""


class UserError(Exception):
    """A mistake in the input. The command line prints its message alone and exits with code 2."""


class InvalidTensorError(UserError):
    """A weight or an activation holds NaN or Inf; the message names the tensor or the site."""


class EngineError(Exception):
    """An engine that runs exported models cannot do what it is asked; the message is its reason."""
