"""What stops a bulk job; a bad row never does."""

from __future__ import annotations

from service.errors import StartError


class BulkError(StartError):
    """The job cannot be done as asked, or a file of it cannot be read; the message names what, for a person."""
