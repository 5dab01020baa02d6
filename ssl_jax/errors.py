"""The ways a command can end other than well, each with the exit code that scripts rely on."""


class UserError(ValueError):
    """Something the user can fix: a flag, a field, a file or the data. The message names the thing and the fix."""

    exit_code = 2


class TrainingDiverged(Exception):
    """The loss or the gradient was not finite too many times in a row; the last good checkpoint stands."""

    exit_code = 3


class Preempted(Exception):
    """SIGTERM or SIGINT arrived; a checkpoint was saved and the same command goes on from it."""

    exit_code = 75
