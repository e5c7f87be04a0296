"""The one exception for input that the user can mend."""


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where (file, line, key) and the cure.

    The command line prints the message alone, on one line, and exits with status 2. Anything else that is raised is a
    bug of ours and keeps its traceback.
    """
