"""The one exception that is the user's to mend."""


class UserError(Exception):
    """A mistake in an option, a file or a folder. The message is one line: what is wrong, where, and what to do.

    The command line prints it and exits with status 2; from Python it is raised as it is.
    """
