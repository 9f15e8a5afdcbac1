"""The errors that a user can act on. Command lines print their message and exit with 1."""


class PifaError(Exception):
    """Base class: the message is one paragraph that names file, module, expected and found."""


class CheckpointError(PifaError):
    """A model directory is incomplete, damaged, or not what it says it is."""


class UnsupportedModelError(PifaError):
    """The model's architecture or one of its settings cannot be compressed or served."""


class CalibrationError(PifaError):
    """The calibration data cannot be used."""


class EvaluationError(PifaError):
    """A model cannot be evaluated on this text, or does not give usable numbers."""
