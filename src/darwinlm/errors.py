"""The one exception that is the user's to fix, as one clear line: what is wrong, where, what to do."""


class UserError(Exception):
    """A mistake in the input. The command line prints its message alone and exits with code 2."""


class InvalidTensorError(UserError):
    """A weight or an activation holds NaN or Inf; the message names the tensor or the site."""
