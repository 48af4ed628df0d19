"""Stored keys: the v1 format, rows of the Node gateways, and every way of not opening."""

import hashlib
import json
import os
import shutil
import string
import subprocess
import traceback
from base64 import b64decode, b64encode, urlsafe_b64decode
from typing import Final
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keyturn.secret import Secret
from keyturn_server.keys.envelope import (
    Unreadable,
    UnreadableCause,
    ciphertext_key_id,
    decode_base64url,
    encode_base64url,
    is_current,
    open_sealed,
    seal,
)
from keyturn_server.keys.keyring import Keyring, MasterKey

RAW: Final = hashlib.sha256(b"envelope current").digest()
OLD_RAW: Final = hashlib.sha256(b"envelope retired").digest()
KEY: Final = MasterKey.from_bytes(RAW)
OLD_KEY: Final = MasterKey.from_bytes(OLD_RAW)
KEYRING: Final = Keyring(KEY, [OLD_KEY])
OLD_KEYRING: Final = Keyring(OLD_KEY)
STRANGE_KEYRING: Final = Keyring(MasterKey.from_bytes(hashlib.sha256(b"another").digest()))

ROW: Final = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
CANARY: Final = "sk-canary-51c0ffee-секрет"

BASE64URL: Final = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"
# Every character of base64 and base64url, and some of neither.
CHARACTERS: Final = string.ascii_letters + string.digits + "+/-_=. \n\0é\U0001f511"

NODE_ENCRYPTS: Final = """
const crypto = require("node:crypto");
const { key, secrets } = JSON.parse(require("node:fs").readFileSync(0, "utf8"));
const rows = secrets.map((secret) => {
  const iv = crypto.randomBytes(16);
  const cipher = crypto.createCipheriv("aes-256-gcm", Buffer.from(key, "hex"), iv);
  const sealed = Buffer.concat([cipher.update(secret, "utf8"), cipher.final()]);
  return Buffer.concat([iv, cipher.getAuthTag(), sealed]).toString("base64");
});
console.log(JSON.stringify(rows));
"""

NODE_DECRYPTS: Final = """
const crypto = require("node:crypto");
const { key, rows } = JSON.parse(require("node:fs").readFileSync(0, "utf8"));
const secrets = rows.map((row) => {
  const raw = Buffer.from(row, "base64");
  const opener = crypto.createDecipheriv(
    "aes-256-gcm", Buffer.from(key, "hex"), raw.subarray(0, 16));
  opener.setAuthTag(raw.subarray(16, 32));
  return opener.update(raw.subarray(32), undefined, "utf8") + opener.final("utf8");
});
console.log(JSON.stringify(secrets));
"""

# Made by Node 20 with NODE_ENCRYPTS' calls, with
# key = sha256("keyturn legacy vector") and iv = sha256("keyturn legacy iv")[:16].
NODE_VECTOR_KEY: Final = "f54a5ea94868200500e59423025122bda57e8c9745371c2564952dc028e5e7b7"
NODE_VECTOR_ROW: Final = "UnxztgUDHYPqrJ203HXG1oDIbEv4vlFIT6r/5emlVcdsmgQFJ2ys6Nfemu1/zcela8IWsh3g/UM="
NODE_VECTOR_SECRET: Final = "sk-node-gateway-ключ"

# Made by this package's first version: a change that can no longer open it loses users' keys.
V1_VECTOR: Final = "v1.f20545ff6da8ca80.IjtL402xLDnUA9kt9q4_kYsLzuNDaH4fSLMdYeyAewzXd-6EYQYTLmlQQJg"


def sealed(
    secret: str = CANARY,
    *,
    keyring: Keyring = KEYRING,
    user_id: str = "u1",
    provider: str = "openai",
    row_id: UUID = ROW,
) -> str:
    return seal(keyring, Secret(secret), user_id=user_id, provider=provider, row_id=row_id)


def opened(
    text: str,
    *,
    keyring: Keyring = KEYRING,
    user_id: str = "u1",
    provider: str = "openai",
    row_id: UUID = ROW,
) -> str:
    found = open_sealed(keyring, text, user_id=user_id, provider=provider, row_id=row_id)
    return found.reveal()


def legacy(secret: bytes = CANARY.encode(), *, raw_key: bytes = RAW) -> str:
    iv = os.urandom(16)
    sealed = AESGCM(raw_key).encrypt(iv, secret, None)
    return b64encode(iv + sealed[-16:] + sealed[:-16]).decode()


def refused(
    text: str,
    *,
    keyring: Keyring = KEYRING,
    user_id: str = "u1",
    provider: str = "openai",
    row_id: UUID = ROW,
) -> Unreadable:
    with pytest.raises(Unreadable) as caught:
        opened(text, keyring=keyring, user_id=user_id, provider=provider, row_id=row_id)
    return caught.value


def node(script: str, **given: object) -> list[str]:
    if shutil.which("node") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("node is missing, and CI proves the Node gateways' format with it")
        pytest.skip("node is missing: the Node gateways' format is proved by the vector only")
    ran = subprocess.run(
        ["node", "-e", script],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    secrets: list[str] = json.loads(ran.stdout)
    return secrets


# The v1 format


def test_what_was_sealed_opens_in_its_place() -> None:
    assert opened(sealed()) == CANARY


def test_the_stored_text_has_the_documented_form() -> None:
    version, key_id, body = sealed("sk-1").split(".")
    assert (version, key_id) == ("v1", KEY.id)
    assert "=" not in body
    assert len(urlsafe_b64decode(body + "=" * (-len(body) % 4))) == 12 + len("sk-1") + 16


def test_a_row_written_by_the_first_version_still_opens() -> None:
    assert opened(V1_VECTOR) == "sk-first-version"


def test_sealing_twice_never_gives_the_same_text() -> None:
    assert len({sealed() for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    ("user_id", "provider", "row_id"),
    [
        ("u2", "openai", ROW),
        ("U1", "openai", ROW),
        ("", "openai", ROW),
        ("u1", "anthropic", ROW),
        ("u1", "openai", UUID(int=ROW.int + 1)),
        # The same letters, with the border between the two ids moved.
        ("u", "1openai", ROW),
        ("u1o", "penai", ROW),
        ("u1openai", "", ROW),
        ("openai", "u1", ROW),
    ],
)
def test_a_ciphertext_moved_to_another_row_does_not_open(user_id: str, provider: str, row_id: UUID) -> None:
    error = refused(sealed(), user_id=user_id, provider=provider, row_id=row_id)
    assert error.cause is UnreadableCause.TAMPERED
    assert error.key_id == KEY.id


def test_a_row_of_a_retired_key_opens() -> None:
    assert opened(sealed(keyring=OLD_KEYRING)) == CANARY


def test_a_row_of_an_unknown_key_names_the_key() -> None:
    error = refused(sealed(), keyring=STRANGE_KEYRING)
    assert error.cause is UnreadableCause.UNKNOWN_KEY
    assert error.key_id == KEY.id
    assert KEY.id in str(error)


def test_a_row_relabelled_with_another_known_key_does_not_open() -> None:
    text = sealed().replace(KEY.id, OLD_KEY.id)
    assert refused(text).cause is UnreadableCause.TAMPERED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v1",
        "v1.",
        "v1..",
        f"v1.{KEY.id}",
        f"v1.{KEY.id}.",
        f"v1.{KEY.id}.AAAA",
        "v1.nobody.AAAA",
        f"v1.{KEY.id.upper()}.AAAA",
        f" v1.{KEY.id}.AAAA",
        f"v2.{KEY.id}.AAAA",
        "sk-proj-stored-in-the-clear",
        "null",
        "\ud800",
    ],
)
def test_what_is_no_ciphertext_is_malformed(text: str) -> None:
    assert refused(text).cause is UnreadableCause.MALFORMED


def test_a_body_in_another_spelling_of_the_same_bytes_is_refused() -> None:
    text = sealed("sk-1")  # 32 bytes: the last character carries 2 unused bits
    last = BASE64URL.index(text[-1])
    for unused_bits in (1, 2, 3):
        twin = text[:-1] + BASE64URL[last | unused_bits]
        assert urlsafe_b64decode(twin[20:] + "=") == urlsafe_b64decode(text[20:] + "=")
        assert refused(twin).cause is UnreadableCause.MALFORMED
    for spelling in (text + "=", text + "\n", text + ".", text[:40] + "\n" + text[40:]):
        assert refused(spelling).cause is UnreadableCause.MALFORMED


def test_contents_that_are_no_text_are_refused_without_being_shown() -> None:
    body = b"\xff\xfe" + CANARY.encode()
    error = refused(legacy(body))
    assert error.cause is UnreadableCause.MALFORMED
    assert error.__context__ is None
    assert "sk-canary" not in "".join(traceback.format_exception(error))


@settings(deadline=None)
@given(
    secret=st.text(),
    user_id=st.text(max_size=128),
    provider=st.text(max_size=64),
    row_id=st.uuids(),
)
def test_any_secret_opens_in_its_place_and_in_no_other(
    secret: str, user_id: str, provider: str, row_id: UUID
) -> None:
    text = sealed(secret, user_id=user_id, provider=provider, row_id=row_id)
    assert opened(text, user_id=user_id, provider=provider, row_id=row_id) == secret
    with pytest.raises(Unreadable):
        opened(text, user_id=user_id + provider[:1], provider=provider[1:] or "x", row_id=row_id)


@pytest.mark.parametrize(
    "text",
    [sealed(), sealed(""), legacy(), legacy(b"")],
    ids=["v1", "v1 empty", "legacy", "legacy empty"],
)
def test_every_change_of_one_character_is_refused(text: str) -> None:
    for index, character in enumerate(text):
        refused(text[:index] + text[index + 1 :])
        for other in CHARACTERS:
            if other != character:
                refused(text[:index] + other + text[index + 1 :])
            refused(text[:index] + other + text[index:])


@pytest.mark.parametrize("text", [sealed(), legacy()], ids=["v1", "legacy"])
def test_every_truncation_is_refused(text: str) -> None:
    for end in range(len(text)):
        refused(text[:end])
        refused(text[end + 1 :])


@pytest.mark.parametrize("start", [0, 12, -16])
def test_every_flipped_bit_is_tampering(start: int) -> None:
    prefix, _, body = sealed().rpartition(".")
    raw = decode_base64url(body)
    assert raw is not None
    place = start % len(raw)
    for bit in range(8):
        changed = raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
        error = refused(f"{prefix}.{encode_base64url(changed)}")
        assert error.cause is UnreadableCause.TAMPERED


@settings(deadline=None)
@given(st.text() | st.text(CHARACTERS) | st.text(CHARACTERS).map(lambda body: f"v1.{KEY.id}.{body}"))
@example("v1." + "." * 50)
def test_any_text_at_all_is_refused_as_unreadable(text: str) -> None:
    refused(text)
    assert ciphertext_key_id(text) in (None, KEY.id)


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_base64url_has_one_spelling(raw: bytes) -> None:
    text = encode_base64url(raw)
    assert decode_base64url(text) == raw
    assert decode_base64url(text + "=") is None
    assert decode_base64url(text + "\n") is None


@settings(deadline=None, max_examples=500)
@given(st.text(CHARACTERS, max_size=8))
@example("AB")  # the bits left over are not zero
@example("A")
def test_no_other_spelling_decodes(text: str) -> None:
    raw = decode_base64url(text)
    assert raw is None or encode_base64url(raw) == text


# Rows of the Node gateways


def test_the_vector_made_by_node_opens() -> None:
    keyring = Keyring(MasterKey.from_bytes(bytes.fromhex(NODE_VECTOR_KEY)))
    assert opened(NODE_VECTOR_ROW, keyring=keyring) == NODE_VECTOR_SECRET


def test_rows_that_node_encrypts_open() -> None:
    secrets = [CANARY, "", "sk-1", "\U0001f511" * 40, *("x" * size for size in range(20))]
    rows = node(NODE_ENCRYPTS, key=RAW.hex(), secrets=secrets)
    assert [opened(row) for row in rows] == secrets


def test_node_opens_the_legacy_rows_these_tests_make() -> None:
    rows = [legacy(), legacy("\U0001f511".encode())]
    assert node(NODE_DECRYPTS, key=RAW.hex(), rows=rows) == [CANARY, "\U0001f511"]


def test_a_legacy_row_opens_under_a_retired_key_and_in_any_place() -> None:
    text = legacy(raw_key=OLD_RAW)
    assert opened(text) == opened(text, user_id="u2", provider="other") == CANARY


def test_a_legacy_row_of_an_unknown_key_says_that_no_key_opens_it() -> None:
    error = refused(legacy(), keyring=STRANGE_KEYRING)
    assert error.cause is UnreadableCause.TAMPERED
    assert error.key_id is None
    assert STRANGE_KEYRING.current.id in str(error)


def test_what_v1_sealed_does_not_open_as_legacy_nor_the_other_way_round() -> None:
    raw = decode_base64url(sealed().rpartition(".")[2])
    assert raw is not None
    nonce, body, tag = raw[:12], raw[12:-16], raw[-16:]
    as_legacy = b64encode(nonce + bytes(4) + tag + body).decode()
    assert refused(as_legacy).cause is UnreadableCause.TAMPERED
    old = b64decode(legacy())
    as_v1 = f"v1.{KEY.id}.{encode_base64url(old[:16] + old[32:] + old[16:32])}"
    assert refused(as_v1).cause is UnreadableCause.TAMPERED


# Rotation


def test_rotation_sees_what_is_left_to_rewrite() -> None:
    assert is_current(KEYRING, sealed())
    for text in (sealed(keyring=OLD_KEYRING), legacy(), "", "v1.", f"v1.{KEY.id}"):
        assert not is_current(KEYRING, text)


def test_rotating_a_row_keeps_its_secret() -> None:
    for old in (sealed(keyring=OLD_KEYRING), legacy(), legacy(raw_key=OLD_RAW)):
        new = sealed(opened(old))
        assert is_current(KEYRING, new)
        assert opened(new, keyring=Keyring(KEY)) == CANARY


def test_the_key_id_of_a_row_is_read_without_opening_it() -> None:
    assert ciphertext_key_id(sealed(keyring=OLD_KEYRING)) == OLD_KEY.id
    for text in (legacy(), "", "v1.", "v1.nobody.AAAA", f"v1.{KEY.id}"):
        assert ciphertext_key_id(text) is None


# Nothing shows


def test_no_secret_key_or_ciphertext_shows_in_any_error() -> None:
    text, old = sealed(), legacy()
    body = text.rpartition(".")[2]
    not_text = legacy(b"\xff" + CANARY.encode())
    errors = [
        refused(text, user_id="u2"),
        refused(text, keyring=STRANGE_KEYRING),
        refused(text[:-1]),
        refused(old, keyring=STRANGE_KEYRING),
        refused(old[:-1]),
        refused(not_text),
        refused(CANARY),
        refused(f"v1.{CANARY}.AAAA"),
    ]
    shown = "".join(f"{error} {error!r} {''.join(traceback.format_exception(error))}" for error in errors)
    for part in (CANARY, "sk-canary", "51c0ffee", body[:16], old[:16], RAW.hex()[:16]):
        assert part not in shown


def test_even_a_traceback_with_locals_shows_no_plaintext_and_no_key() -> None:
    for text in (sealed(user_id="u2"), legacy(b"\xff" + b"sk-canary-51c0ffee")):
        error = refused(text)
        found = traceback.TracebackException.from_exception(error, capture_locals=True)
        shown = "".join(found.format())
        assert "open_sealed" in shown
        for part in ("sk-canary", "51c0ffee", RAW.hex()[:16], OLD_RAW.hex()[:16], repr(RAW)[2:14]):
            assert part not in shown
