"""The errors a user can cause. Each message says the value, the limit and the fix; entry points print it without a traceback."""


class PTuningError(Exception):
    """Base of every error that is the input's fault, not the program's. Entry points print `str(error)` and exit with 2."""


class ConfigError(PTuningError):
    """A flag, a YAML key or a combination of them can't be used."""


class DataError(PTuningError):
    """A data file is missing, unreadable or has rows that can't be trained on."""


class ModelError(PTuningError):
    """A model directory is not a checkpoint of a family that this package supports."""


class CheckpointError(PTuningError):
    """A tuned checkpoint is missing, damaged or does not belong to the base model given."""


class TrainingError(PTuningError):
    """Training can't go on, for example because the loss is not finite."""


class GenerationError(PTuningError):
    """An answer can't be generated.

    Args:
        request: the id of the engine's request that is at fault.
    """

    def __init__(self, message: str, request: object = None):
        super().__init__(message)
        self.request = request
