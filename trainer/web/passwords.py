"""Names and passwords of those who may use the page."""

import hmac
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pipeline.core.errors import UsageError

CheckLogin = Callable[[str, str], bool]  # name, password

_MOST_ATTEMPTS: Final = 10
_SECONDS: Final = 60.0


class Attempts:
    """Counts logins: a password that can be tried without end is found. Of one address at most ten in a minute; right
    ones count too, so that how long an answer takes or whether it comes says nothing of the password."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._made: Counter[str] = Counter()

    def may(self, address: str) -> bool:
        """Whether one more from this address is let in; counts it."""
        if self._clock() - self._began >= _SECONDS:
            self._began = self._clock()
            self._made.clear()
        self._made[address] += 1
        return self._made[address] <= _MOST_ATTEMPTS


def read_logins(text: str, where: str) -> CheckLogin:
    """From lines of NAME:PASSWORD. UsageError, which names the place, for other ones and where there is none."""
    logins: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        name, _, password = line.strip().partition(":")
        if not (name and password):
            raise UsageError(f"{where}, line {number}: give NAME:PASSWORD on each line")
        logins[name] = password
    if not logins:
        raise UsageError(f"{where} is empty: give NAME:PASSWORD, one a line")

    def is_right(name: str, password: str) -> bool:
        return hmac.compare_digest(logins.get(name, "").encode(), password.encode()) and name in logins

    return is_right


def login_check(file: str | None, variable: str | None) -> CheckLogin | None:
    """Of --password-file, else of HDM_PAGE_PASSWORD; None where neither is given."""
    if file is None:
        return read_logins(variable, "HDM_PAGE_PASSWORD") if variable is not None else None
    try:
        return read_logins(Path(file).read_text(), f"--password-file {file}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--password-file {file}: {error}; give a text file of NAME:PASSWORD lines") from error
