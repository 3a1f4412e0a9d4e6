"""The exceptions that end a command with one line, and their exit codes; all others are bugs and show a traceback."""


class InputError(ValueError):
    """Invalid input from the user. The message is one line: what was given, and what is allowed."""


class Stopped(Exception):
    """The run has stopped after a signal and is saved; the same command continues it with ``--resume auto``."""


class OutOfMemory(Exception):
    """The device has too little memory. The message is one line: what did not fit, and what would."""


EXIT_CODES: dict[type[BaseException], int] = {
    InputError: 2,
    Stopped: 75,  # EX_TEMPFAIL of sysexits.h: try again
    FloatingPointError: 1,  # training diverged, or logits of an evaluation are not finite
    OutOfMemory: 1,
    KeyboardInterrupt: 130,
}
