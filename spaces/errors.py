"""The one exception that stands for bad input from a user."""


class InputError(ValueError):
    """Bad input, said in one line: which field, which value, what to do about it.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        super().__init__(f"{field}: {value!r}: {remedy}" if value is not None else f"{field}: {remedy}")

    def __reduce__(self) -> tuple[type["InputError"], tuple[str, object, str]]:
        return InputError, (self.field, self.value, self.remedy)
