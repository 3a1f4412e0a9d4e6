"""How a command can end early, and with which exit code; everything else is a defect and keeps its traceback."""


class InputError(ValueError):
    """Something a user gave is wrong. The message is one line: what was given and what is allowed."""


class Stopped(Exception):
    """The run was asked to stop, and what it had done is saved; the same command continues it."""


EXIT_CODES: dict[type[BaseException], int] = {
    InputError: 2,
    Stopped: 75,  # EX_TEMPFAIL of sysexits.h: try again
    FloatingPointError: 1,  # the numbers went wrong
    KeyboardInterrupt: 130,
}
