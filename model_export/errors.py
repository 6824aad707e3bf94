"""What stops an export, said in one line."""


class ExportError(Exception):
    """A figure out of tolerance, or an input or output that cannot be used; nothing has been written."""
