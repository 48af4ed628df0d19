"""Master keys from settings, their fingerprints, and what is said when they are wrong."""

import dataclasses
import hashlib
import re
import secrets
import traceback

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyturn_server.keys.keyring import (
    DuplicateMasterKey,
    Keyring,
    MalformedMasterKey,
    MasterKey,
    MissingCurrentKey,
    derive,
    parse_master_key,
)

CURRENT = hashlib.sha256(b"current").hexdigest()
RETIRED = hashlib.sha256(b"retired").hexdigest()
HEX_KEY = re.compile("[0-9a-fA-F]{64}")
OLDEST = hashlib.sha256(b"oldest").hexdigest()


def refusal(text: str, name: str = "ENCRYPTION_KEY") -> str:
    with pytest.raises(MalformedMasterKey) as refused:
        parse_master_key(text, name=name)
    assert refused.value.__context__ is None
    return str(refused.value)


def test_a_key_is_read_in_either_case() -> None:
    lower, upper = (parse_master_key(text, name="K") for text in (CURRENT, CURRENT.upper()))
    assert lower == upper == MasterKey.from_bytes(bytes.fromhex(CURRENT))


def test_the_fingerprint_is_known_and_does_not_drift() -> None:
    # Stored in every row: if this changes, no row opens.
    assert parse_master_key(CURRENT, name="K").id == "09725656fdea937b"


def test_fingerprints_differ_and_share_nothing_with_the_key() -> None:
    ids = set()
    for _ in range(200):
        text = secrets.token_hex(32)
        key = parse_master_key(text, name="K")
        assert len(bytes.fromhex(key.id)) == 8
        assert key.id not in text
        assert key.id != hashlib.sha256(bytes.fromhex(text)).hexdigest()[:16]
        ids.add(key.id)
    assert len(ids) == 200


def test_one_purpose_tells_nothing_of_another() -> None:
    root = bytes.fromhex(CURRENT)
    assert derive(root, b"a") != derive(root, b"b")
    assert derive(root, b"a", length=8) == derive(root, b"a")[:8]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        (CURRENT + "\n", "whitespace around it"),
        (" " + CURRENT, "whitespace around it"),
        (f'"{CURRENT}"', "quotation mark around it"),
        (f"'{CURRENT}'", "quotation mark around it"),
        ("0x" + CURRENT, "begins with 0x"),
        (CURRENT[:-1], "has 63 characters"),
        (CURRENT + "0", "has 65 characters"),
        (CURRENT[:32], "has 32 characters"),
        (CURRENT[:16] + "g" + CURRENT[17:], "as character 17"),
        ("Z" + CURRENT[1:], "as character 1."),
        (CURRENT[:-1] + "-", "as character 64"),
        (CURRENT[:10] + " " + CURRENT[11:], "as character 11"),
        (CURRENT[:10] + "\uff11" + CURRENT[11:], "as character 11"),
    ],
)
def test_a_malformed_key_is_told_what_is_wrong_with_it(text: str, says: str) -> None:
    message = refusal(text, name="ENCRYPTION_KEYS_RETIRED[1]")
    assert message.startswith("ENCRYPTION_KEYS_RETIRED[1] ")
    assert says in message
    assert "openssl rand -hex 32" in message


@pytest.mark.parametrize(
    "text",
    [
        "00" * 32,
        "ff" * 32,
        "ab" * 32,
        "0123456789abcdef" * 4,
        "deadbeef" * 8,
        CURRENT[:32] * 2,
        bytes(range(32)).hex(),
        bytes(range(32, 0, -1)).hex(),
    ],
)
def test_a_key_that_nobody_drew_at_random_is_marked_weak(text: str) -> None:
    assert parse_master_key(text, name="K").is_weak


def test_a_random_key_is_not_marked_weak() -> None:
    assert not parse_master_key(CURRENT, name="K").is_weak


@settings(deadline=None)
@given(st.text(max_size=80) | st.text("0123456789abcdefABCDEF", min_size=60, max_size=68))
@example("0" * 64)
@example("٣" * 64)
@example("0x" + CURRENT)
def test_any_text_is_a_key_or_malformed_and_nothing_else(text: str) -> None:
    if HEX_KEY.fullmatch(text):
        assert parse_master_key(text, name="K").id != text[:16]
    else:
        # Whatever the text, one of these sentences: only a count or a place comes from it.
        problem = refusal(text).partition(". It must be 64 hexadecimal characters")[0]
        assert re.sub(r"\d+", "N", problem.removeprefix("ENCRYPTION_KEY ")) in {
            "is empty",
            "has whitespace around it",
            "has a quotation mark around it",
            "begins with Nx, which is no part of a key",
            "has N characters",
            "has something else than a hexadecimal digit as character N",
        }


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="not 16"):
        MasterKey.from_bytes(bytes(16))


def test_without_keys_there_is_no_keyring() -> None:
    assert Keyring.from_settings(None, []) is None


def test_an_empty_key_is_not_taken_for_an_unset_one() -> None:
    with pytest.raises(MalformedMasterKey, match="ENCRYPTION_KEY is empty"):
        Keyring.from_settings("", [])


def test_retired_keys_without_a_current_one_are_refused_by_name() -> None:
    with pytest.raises(MissingCurrentKey, match="ENCRYPTION_KEYS_RETIRED is set"):
        Keyring.from_settings(None, [RETIRED])


def test_a_malformed_retired_key_is_named_by_its_place_counted_from_0() -> None:
    with pytest.raises(MalformedMasterKey, match=r"^ENCRYPTION_KEYS_RETIRED\[1\] has 4 characters"):
        Keyring.from_settings(CURRENT, [RETIRED, "abcd"])


@pytest.mark.parametrize(
    ("retired", "says"),
    [
        ([CURRENT], r"ENCRYPTION_KEYS_RETIRED\[0\] is the same key as ENCRYPTION_KEY "),
        ([CURRENT.upper()], r"ENCRYPTION_KEYS_RETIRED\[0\] is the same key as ENCRYPTION_KEY "),
        (
            [RETIRED, OLDEST, RETIRED],
            r"RETIRED\[2\] is the same key as ENCRYPTION_KEYS_RETIRED\[0\]",
        ),
    ],
)
def test_a_key_set_twice_is_refused(retired: list[str], says: str) -> None:
    with pytest.raises(DuplicateMasterKey, match=says):
        Keyring.from_settings(CURRENT, retired)


def test_a_keyring_finds_its_keys_and_lists_the_current_one_first() -> None:
    keys = [parse_master_key(text, name="K") for text in (CURRENT, RETIRED, OLDEST)]
    keyring = Keyring.from_settings(CURRENT, [RETIRED, OLDEST])
    assert keyring is not None
    assert keyring.current == keys[0]
    assert list(keyring) == keys
    assert keyring.ids == tuple(key.id for key in keys)
    assert keyring.by_id(keys[2].id) == keys[2]
    assert keyring.by_id("0" * 16) is None


def test_a_keyring_does_not_change() -> None:
    keyring = Keyring(parse_master_key(CURRENT, name="K"))
    with pytest.raises(AttributeError):
        keyring.current = parse_master_key(RETIRED, name="K")  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        keyring.current.id = "other"  # type: ignore[misc]


def test_no_key_shows_in_a_repr_or_a_refusal() -> None:
    keyring = Keyring.from_settings(CURRENT, [RETIRED])
    assert keyring is not None
    shown = f"{keyring} {keyring!r} {keyring.current} {keyring.current!r} {list(keyring)}"
    assert shown.startswith("Keyring(ids=['09725656fdea937b', ")
    assert f"MasterKey(id='{keyring.current.id}')" in shown
    for current, retired in [
        (CURRENT + "\n", []),
        (f'"{CURRENT}"', []),
        (CURRENT[:-1] + "z", []),
        (CURRENT, [CURRENT]),
        (CURRENT, [RETIRED + " "]),
        (None, [RETIRED]),
    ]:
        with pytest.raises(ValueError, match="ENCRYPTION_KEY") as refused:
            Keyring.from_settings(current, retired)
        shown += "".join(traceback.format_exception(refused.value))
    for text in (CURRENT, RETIRED):
        raw = bytes.fromhex(text)
        for part in (text[:8], text[-8:], text[24:32], repr(raw)[2:12]):
            assert part not in shown
