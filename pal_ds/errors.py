"""The one exception for mistakes a person can mend; the command line prints it and exits with code 2."""


class UserError(ValueError):
    """Bad input or configuration. The message says what was wrong, where, the rule and the remedy."""
