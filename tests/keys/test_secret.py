"""Secret: nothing prints, pickles or hashes it, and `reveal` is the one way out."""

import copy
import dataclasses
import json
import logging
import pickle
import traceback

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keyturn.secret import Secret

CANARY = "sk-canary-5b2f1e"


@dataclasses.dataclass(frozen=True)
class Holder:
    name: str
    secret: Secret


def test_reveal_gives_the_value_back() -> None:
    assert Secret(CANARY).reveal() == CANARY


@pytest.mark.parametrize(
    "show",
    [
        str,
        repr,
        ascii,
        "{}".format,
        "{!r:>40}".format,
        "{:.400}".format,
        lambda secret: "%s %r" % (secret, secret),  # noqa: UP031
        lambda secret: repr([secret, {"key": secret}, Holder("a", secret)]),
        lambda secret: json.dumps({"key": secret}, default=str),
        lambda secret: str(dataclasses.asdict(Holder("a", secret))),
    ],
)
def test_no_way_of_printing_shows_it(show: object) -> None:
    assert callable(show)
    shown = show(Secret(CANARY))
    assert CANARY not in shown
    assert "Secret(***)" in shown


def test_formatting_keeps_the_width_asked_for() -> None:
    assert f"{Secret(CANARY):>13}" == "  Secret(***)"


def test_a_log_line_does_not_show_it(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("test").warning("key %s %r", Secret(CANARY), Secret(CANARY))
    assert caplog.messages == ["key Secret(***) Secret(***)"]


def test_equal_contents_are_equal_and_others_are_not() -> None:
    assert Secret(CANARY) == Secret(CANARY)
    assert Secret(CANARY) != Secret(CANARY + "x")
    assert Secret("ключ") == Secret("ключ")
    assert Secret("é") != Secret("e\u0301")


def test_a_secret_never_equals_a_plain_string() -> None:
    assert Secret(CANARY) != CANARY
    assert CANARY != Secret(CANARY)  # noqa: SIM300


def test_a_secret_has_no_hash() -> None:
    with pytest.raises(TypeError, match="unhashable"):
        hash(Secret(CANARY))


def test_a_secret_has_no_length_and_an_empty_one_is_no_less_true() -> None:
    with pytest.raises(TypeError):
        len(Secret(CANARY))  # type: ignore[arg-type]
    assert bool(Secret("")) is bool(Secret(CANARY)) is True


def test_a_secret_does_not_change() -> None:
    secret = Secret(CANARY)
    with pytest.raises(AttributeError):
        secret._value = "other"
    with pytest.raises(AttributeError):
        secret.note = "other"
    with pytest.raises(AttributeError):
        del secret._value
    assert secret.reveal() == CANARY


def test_a_secret_has_no_dict_to_look_into() -> None:
    assert not hasattr(Secret(CANARY), "__dict__")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_secret_is_not_pickled(protocol: int) -> None:
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(Holder("a", Secret(CANARY)), protocol)


def test_a_secret_gives_its_state_to_nobody() -> None:
    with pytest.raises(TypeError, match="not pickled"):
        Secret(CANARY).__getstate__()
    with pytest.raises(TypeError):
        Secret(CANARY).__reduce__()


def test_a_copy_is_the_same_secret() -> None:
    secret = Secret(CANARY)
    assert copy.copy(secret) is secret
    assert copy.deepcopy([secret])[0] is secret
    assert dataclasses.asdict(Holder("a", secret))["secret"] is secret


@pytest.mark.parametrize("value", [None, CANARY.encode(), 7, Secret(CANARY)])
def test_only_a_string_becomes_a_secret(value: object) -> None:
    with pytest.raises(TypeError, match="a secret holds a str, not") as refused:
        Secret(value)  # type: ignore[arg-type]
    assert CANARY not in "".join(traceback.format_exception(refused.value))


def test_a_lone_surrogate_is_refused_without_showing_the_rest() -> None:
    with pytest.raises(ValueError, match="lone surrogate") as refused:
        Secret(CANARY + "\udc80")
    assert refused.value.__context__ is None
    assert not isinstance(refused.value, UnicodeError)
    assert CANARY not in "".join(traceback.format_exception(refused.value))


def test_a_traceback_with_locals_does_not_show_it() -> None:
    secret = Secret(CANARY)
    try:
        raise LookupError(secret)
    except LookupError as error:
        shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert "secret = Secret(***)" in shown
    assert CANARY not in shown


@settings(deadline=None)
@given(st.text(), st.text())
def test_equality_is_that_of_the_contents(one: str, other: str) -> None:
    assert (Secret(one) == Secret(other)) is (one == other)
    assert Secret(one) == Secret(one)
