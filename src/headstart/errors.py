"""The exception for mistakes that the user can fix."""


class UserError(Exception):
    """A mistake in an option, a file or a folder; the message is one line: what is wrong, where, and what to do.

    The command line prints the message and exits with status 2; Python code gets the exception.
    """
