"""The one error of the load test, apart so that any of its modules can raise it."""


class LoadTestError(Exception):
    """A load test that cannot go on; its text is the one line that the caller sees."""
