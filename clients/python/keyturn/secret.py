"""A value that must never be printed, logged, pickled or hashed by accident."""

from __future__ import annotations

import hmac
from typing import Any, NoReturn, Self, final

_SHOWN = "Secret(***)"


@final
class Secret:
    """A string that shows itself as ``Secret(***)``; :meth:`reveal` is the one way out.

    Equality is constant-time in the contents (not in the length) and holds between secrets only.
    A secret is not hashable: a hash would tell of its contents, and one by identity would
    contradict equality. It refuses pickling; ``copy``, ``deepcopy`` and so ``dataclasses.asdict``
    give the same object back. It has no length: neither ``len()`` nor truth tells an empty one.

    Raises:
        TypeError: the value is not a ``str``.
        ValueError: the value cannot be written as UTF-8 (a lone surrogate).
    """

    __slots__ = ("_value",)
    _value: str

    def __new__(cls, value: str) -> Self:
        # `object`, so that a caller without a type checker gets the sentence too.
        given: object = value
        if not isinstance(given, str):
            raise TypeError(f"a secret holds a str, not {type(given).__name__}")
        if not _is_utf8(value):
            raise ValueError("a secret must be valid Unicode text; this one has a lone surrogate")
        secret = super().__new__(cls)
        object.__setattr__(secret, "_value", value)
        return secret

    def reveal(self) -> str:
        """The value itself. Search for ``.reveal(`` to find every place that sees it."""
        return self._value

    def __repr__(self) -> str:
        return _SHOWN

    def __format__(self, spec: str) -> str:
        return format(_SHOWN, spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Secret):
            return NotImplemented
        return hmac.compare_digest(self._value.encode(), other._value.encode())

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError("a secret does not change")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError("a secret does not change")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a secret is not pickled")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a secret is not pickled")


def _is_utf8(value: str) -> bool:
    # The UnicodeEncodeError holds the whole value, so it ends here: no chain, no context.
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
