"""The one exception that stands for bad input from a user, and where a user's own code went wrong."""

import re

_FRAME = re.compile(r'File "(.+)", line (\d+), in (.+)')


def own_place(traceback: str) -> str:
    """`FILE, line N, in FUNCTION` of the last frame of a traceback that is in no installed package.

    With a detector of one's own that is in it, also where torch raised. Empty where there is no such frame.
    """
    frames = [frame for frame in _FRAME.findall(traceback) if "site-packages" not in frame[0]]
    return "{}, line {}, in {}".format(*frames[-1]) if frames else ""


class InputError(ValueError):
    """Bad input, said in one line: which field, which value, what to do about it.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field}: {value!r}: {remedy}" if value is not None else f"{field}: {remedy}")

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, object, str]]:
        return InputError, (self.field, self.value, self.remedy)
