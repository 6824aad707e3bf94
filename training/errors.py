"""What a person running a command did wrong, said in one line."""


class TrainingError(Exception):
    """A problem with the data, the options or a run directory; its text names it and what would be right."""
