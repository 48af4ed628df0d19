"""A provider's answer about a key, over real HTTP: what it counts for, and what of its words is kept."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from keyturn.secret import Secret
from keyturn_server.configuration import Provider
from keyturn_server.keys.provider_checks import KeyCheck, ProviderChecks, open_provider_checks
from tests import providers as play
from tests.providers import NOBODY, Providers, playing_providers
from tests.support import eventually

KEY = "sk-proj-aB3dE6fGh9iJkLmN_oPqRs-tUvW4x5Yz"
VALID, INVALID, UNVERIFIED = KeyCheck.VALID, KeyCheck.INVALID, KeyCheck.UNVERIFIED

OPENAI = Provider(
    id="openai",
    name="OpenAI",
    is_enabled=True,
    base_url=NOBODY,
    auth_header="Authorization",
    auth_prefix="Bearer ",
    key_pattern=".*",
    check_path="models",
    check_headers={},
    check_refusal=None,
)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Providers]:
    """The providers without a database."""
    async with playing_providers() as providers:
        yield providers


@pytest.fixture
def openai(server: Providers) -> Provider:
    """OpenAI at the server."""
    return replace(OPENAI, base_url=f"{server.url}/openai/v1")


@pytest_asyncio.fixture
async def checks() -> AsyncIterator[ProviderChecks]:
    """Checks that have all the time they need."""
    async with open_provider_checks(timeout=timedelta(seconds=30), proxy=None) as checks:
        yield checks


def assert_clean(text: str, secret: str = KEY) -> None:
    """Raises AssertionError when five characters in a row of the secret are in the text, or a quarter of
    a short one and one more."""
    size = min(5, len(secret) // 4 + 1)
    parts = {secret[start : start + size].lower() for start in range(len(secret) - size + 1)}
    assert not [part for part in parts if part in text.lower()], text


# -- what an answer counts for ------------------------------------------------------------------------

REFUSED = "The provider refused the key"
ANSWERS: dict[str, tuple[play.Behaviour, KeyCheck, str]] = {
    "200": (play.accept, VALID, "The provider took the key."),
    "204": (play.answer(204, b""), VALID, "The provider took the key."),
    "200 and no JSON": (play.answer(200, b"\xff\xfe<html>"), VALID, "The provider took the key."),
    "429": (play.limit, VALID, "The provider knows the key, and asks for patience (429)."),
    "401": (
        play.refuse,
        INVALID,
        (
            f"{REFUSED} (401): Incorrect API key provided: ***. "
            "You can find your API key at https://platform.openai.com/account/api-keys."
        ),
    ),
    "401 without a word": (play.answer(401, b""), INVALID, f"{REFUSED} (401)."),
    "401 in HTML": (play.answer(401, b"<html>401</html>"), INVALID, f"{REFUSED} (401)."),
    "403": (
        play.forbid,
        INVALID,
        f"{REFUSED} (403): You have insufficient permissions for this operation. Missing scopes: model.read.",
    ),
    "400": (
        play.answer(400, {"error": "Bad Request"}),
        UNVERIFIED,
        "The provider answered with 400, which says nothing of the key: Bad Request.",
    ),
    "402": (
        play.answer(402, {"error": {"message": "Insufficient Balance"}}),
        UNVERIFIED,
        "The provider answered with 402, which says nothing of the key: Insufficient Balance.",
    ),
    "404": (
        play.answer(404, {}),
        UNVERIFIED,
        "The provider answered with 404, which says nothing of the key.",
    ),
    "500": (
        play.fail,
        UNVERIFIED,
        "The provider answered with 500, which says nothing of the key: The server had an error.",
    ),
    "a redirect": (
        play.redirect,
        UNVERIFIED,
        "The provider answered with 302, which says nothing of the key.",
    ),
    "a reset": (play.reset, UNVERIFIED, "The provider cannot be reached."),
    "a closed connection": (play.close, UNVERIFIED, "The provider cannot be reached."),
    "no HTTP": (play.babble, UNVERIFIED, "The provider cannot be reached."),
    "a gigabyte": (play.flood, INVALID, f"{REFUSED} (401)."),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_an_answer_counts_for(
    server: Providers, openai: Provider, checks: ProviderChecks, name: str
) -> None:
    behaviour, result, message = ANSWERS[name]
    server.will(behaviour, KEY)
    checked = await checks.check(openai, Secret(KEY))
    assert (checked.result, checked.message) == (result, message)
    assert len(server.seen) == 1, "a redirect is not followed, and nothing is tried again"


@pytest.mark.parametrize("behaviour", [play.hang, play.trickle], ids=["silent", "never at an end"])
async def test_a_provider_that_takes_too_long_says_nothing_of_the_key(
    server: Providers, openai: Provider, behaviour: play.Behaviour
) -> None:
    server.will(behaviour, KEY)
    async with open_provider_checks(timeout=timedelta(seconds=0.3), proxy=None) as checks:
        checked = await checks.check(openai, Secret(KEY))
    assert (checked.result, checked.message) == (UNVERIFIED, "The provider did not answer in time.")
    assert len(server.seen) == 1


@pytest.mark.parametrize("refusal", ["api_key_invalid", "no, not this one"])
async def test_a_refusal_with_another_status_is_known_by_what_the_row_says_of_it(
    server: Providers, checks: ProviderChecks, refusal: str
) -> None:
    google = replace(
        OPENAI,
        id="google",
        base_url=f"{server.url}/google/v1beta",
        auth_header="x-goog-api-key",
        auth_prefix="",
        check_refusal="API_KEY_INVALID",
    )
    server.will(play.answer(400, {"error": {"message": "So.", "reason": refusal}}), KEY)
    checked = await checks.check(google, Secret(KEY))
    assert checked.result is (INVALID if refusal == "api_key_invalid" else UNVERIFIED)
    # Never where it is not an error of the caller's, whatever it says.
    for status, expected in ((200, VALID), (429, VALID), (302, UNVERIFIED), (500, UNVERIFIED)):
        server.will(play.answer(status, {"error": "API_KEY_INVALID"}), KEY)
        assert (await checks.check(google, Secret(KEY))).result is expected


PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "nobody listens": ({"base_url": NOBODY}, "The provider cannot be reached."),
    "no URL": ({"base_url": "openai"}, "The provider cannot be reached."),
    "no URL at all": ({"base_url": "http://[::1"}, "The provider cannot be reached."),
    "no scheme of ours": ({"base_url": "ftp://127.0.0.1"}, "The provider cannot be reached."),
    "a header of two lines": ({"auth_header": "a\r\nb"}, "The provider cannot be reached."),
    "a prefix of two lines": ({"auth_prefix": "Bearer\r\nx: "}, "The provider cannot be reached."),
    "a header of two words": ({"auth_header": "x key"}, "The provider cannot be reached."),
    "a header that is two": ({"auth_header": "x: y\r\nkey"}, "The provider cannot be reached."),
    "a prefix in Greek": ({"auth_prefix": "κλειδί "}, "The provider cannot be reached."),
    "a header without a name": ({"auth_header": ""}, "The provider cannot be reached."),
    "a header in Greek": ({"check_headers": {"κλειδί": "x"}}, "The provider cannot be reached."),
    "no way to check": ({"check_path": None}, "Keys of this provider cannot be checked."),
}


@pytest.mark.parametrize("name", PLACES)
async def test_a_provider_that_cannot_be_asked_says_nothing_of_the_key(
    server: Providers, openai: Provider, checks: ProviderChecks, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes, message = PLACES[name]
    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "httpcore"):
        checked = await checks.check(replace(openai, **changes), Secret(KEY))
    assert (checked.result, checked.message) == (UNVERIFIED, message)
    assert server.seen == []
    assert_clean(caplog.text)


@pytest.mark.parametrize(
    "secret",
    ["sk-a\r\nhost: x", "sk-a\n", "sk-a b", "sk-é", "sk-\0", "", "sk-\N{FULLWIDTH LATIN SMALL LETTER A}"],
)
async def test_a_key_that_cannot_stand_in_a_header_is_not_sent(
    server: Providers, openai: Provider, checks: ProviderChecks, secret: str
) -> None:
    checked = await checks.check(openai, Secret(secret))
    assert checked.result is UNVERIFIED
    assert checked.message == "The key has characters that cannot stand in an HTTP header."
    assert server.seen == []


# -- how a provider is asked --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_url", "path", "target"),
    [
        ("/v1", "models", "/v1/models"),
        ("/v1/", "models", "/v1/models"),
        ("", "models?limit=1", "/models?limit=1"),
        ("/v2", "../v1/models", "/v1/models"),
    ],
)
async def test_the_path_is_joined_to_the_base_url(
    server: Providers, openai: Provider, checks: ProviderChecks, base_url: str, path: str, target: str
) -> None:
    await checks.check(
        replace(openai, base_url=f"{server.url}/openai{base_url}", check_path=path), Secret(KEY)
    )
    (seen,) = server.seen
    assert (seen.method, seen.target) == ("GET", target)


async def test_the_key_goes_in_the_providers_own_header_beside_those_of_the_row(
    server: Providers, openai: Provider, checks: ProviderChecks
) -> None:
    anthropic = replace(
        openai,
        base_url=f"{server.url}/anthropic/v1",
        auth_header="x-api-key",
        auth_prefix="",
        check_headers={"anthropic-version": "2023-06-01", "Accept": "text/json"},
    )
    await checks.check(anthropic, Secret(KEY))
    (seen,) = server.seen
    assert {name: value for name, value in seen.headers.items() if name not in {"host", "connection"}} == {
        "x-api-key": KEY,
        "anthropic-version": "2023-06-01",
        "accept": "text/json",
        "accept-encoding": "identity",
        "user-agent": "keyturn",
    }


async def test_nothing_of_one_check_is_in_the_next(
    server: Providers, openai: Provider, checks: ProviderChecks
) -> None:
    for _ in range(2):
        assert (await checks.check(openai, Secret(KEY))).result is VALID
    assert "cookie" not in server.seen[1].headers


async def test_a_proxy_is_the_one_that_is_set_and_none_of_the_environment(
    server: Providers, openai: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, NOBODY)
    timeout = timedelta(seconds=30)
    async with open_provider_checks(timeout=timeout, proxy=None) as checks:
        assert (await checks.check(openai, Secret(KEY))).result is VALID
    async with open_provider_checks(timeout=timeout, proxy=NOBODY) as checks:
        assert (await checks.check(openai, Secret(KEY))).result is UNVERIFIED
    assert len(server.seen) == 1


def certificate_in(directory: Path) -> tuple[Path, Path]:
    """A new certificate for 127.0.0.1 that nobody has signed but itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a provider")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = directory / "certificate.pem", directory / "key.pem"
    files[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    files[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return files


async def test_a_provider_gets_a_key_only_once_it_has_proven_who_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = certificate_in(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    timeout = timedelta(seconds=30)
    async with playing_providers(tls=tls) as server:
        provider = replace(OPENAI, base_url=f"{server.url}/openai/v1")
        async with open_provider_checks(timeout=timeout, proxy=None) as checks:
            assert (await checks.check(provider, Secret(KEY))).result is UNVERIFIED
        assert server.seen == []
        # Where OpenSSL finds what this machine trusts.
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with open_provider_checks(timeout=timeout, proxy=None) as checks:
            assert (await checks.check(provider, Secret(KEY))).result is VALID
        assert [seen.key for seen in server.seen] == [KEY]


async def test_so_many_at_once_and_no_more(
    server: Providers, openai: Provider, checks: ProviderChecks
) -> None:
    gate = asyncio.Event()
    server.will(play.when(gate, play.accept), KEY)
    asking = [asyncio.create_task(checks.check(openai, Secret(KEY))) for _ in range(100)]
    await server.asked(64)
    await asyncio.sleep(0.05)
    assert len(server.seen) == 64
    gate.set()
    assert [checked.result for checked in await asyncio.gather(*asking)] == [VALID] * 100


async def test_whoever_waits_too_long_gives_up_and_leaves_the_turns_to_others(
    server: Providers, openai: Provider
) -> None:
    server.will(play.hang, KEY)
    async with open_provider_checks(timeout=timedelta(seconds=1), proxy=None) as checks:
        found = await asyncio.gather(*(checks.check(openai, Secret(KEY)) for _ in range(100)))
        assert [checked.result for checked in found] == [UNVERIFIED] * 100
        server.will(play.accept, KEY)

        async def is_valid() -> bool:
            return (await checks.check(openai, Secret(KEY))).result is VALID

        await eventually(is_valid)


async def test_what_came_of_it_is_told_by_its_cause_alone(server: Providers, openai: Provider) -> None:
    told: list[tuple[str, KeyCheck, str]] = []
    async with open_provider_checks(
        timeout=timedelta(seconds=0.3), proxy=None, on_check=lambda *each: told.append(each)
    ) as checks:
        for behaviour in (play.accept, play.refuse, play.fail, play.hang):
            server.will(behaviour, KEY)
            await checks.check(openai, Secret(KEY))
        await checks.check(replace(openai, base_url=NOBODY), Secret(KEY))
        await checks.check(replace(openai, check_path=None), Secret(KEY))
    assert told == [
        ("openai", VALID, "200"),
        ("openai", INVALID, "401"),
        ("openai", UNVERIFIED, "500"),
        ("openai", UNVERIFIED, "timeout"),
        ("openai", UNVERIFIED, "ConnectError"),
    ]


# -- what is kept of its words ------------------------------------------------------------------------

SHAPES: dict[str, tuple[object, str]] = {
    "error.message": ({"error": {"message": "No."}}, "No."),
    "error": ({"error": "No."}, "No."),
    "message": ({"message": "No."}, "No."),
    "detail": ({"detail": "No."}, "No."),
    "errors": ({"errors": [{"message": "No."}]}, "No."),
    "a list": ([{"error": {"message": "No."}}], "No."),
    "fault": ({"fault": {"faultstring": "No.", "detail": {}}}, "No."),
    "a text": ("No.", "No."),
    "a number before the text": ({"error": 401, "message": "No."}, "No."),
    "nothing before the text": ({"error": None, "detail": "", "message": "No."}, "No."),
    "only numbers": ({"error": 401}, ""),
    "a message that is none": ({"error": {"message": 7}}, ""),
    "too deep": ({"error": {"error": {"error": {"error": {"error": "No."}}}}}, ""),
    "without a full stop": ({"error": "No"}, "No."),
    "a question": ({"error": "No?"}, "No?"),
    "several lines": (
        {"error": "No,\r\n\tnot \0 this\x85one\N{RIGHT-TO-LEFT OVERRIDE}\ud800."},
        "No, not this one .",
    ),
    "long": ({"error": "word " * 1000}, f"{('word ' * 60).rstrip()}…"),
    "empty": ({}, ""),
}


@pytest.mark.parametrize("name", SHAPES)
async def test_its_words_are_found_in_whatever_shape(
    server: Providers, openai: Provider, checks: ProviderChecks, name: str
) -> None:
    body, words = SHAPES[name]
    server.will(play.answer(401, body), KEY)
    checked = await checks.check(openai, Secret(KEY))
    assert checked.message == f"{REFUSED} (401){': ' + words if words else ''}{'' if words else '.'}"


@pytest.mark.parametrize(
    "body", [b"[" * 15_000, b'{"error":' * 1500, b"1" * 15_000, b"\xff" * 20_000, b'"\\']
)
async def test_what_is_hard_to_read_is_not_read(
    server: Providers, openai: Provider, checks: ProviderChecks, body: bytes
) -> None:
    server.will(play.answer(401, body), KEY)
    assert (await checks.check(openai, Secret(KEY))).message == f"{REFUSED} (401)."


QUOTES: dict[str, Callable[[str], str]] = {
    "whole": lambda key: f"Not {key}.",
    "in a word": lambda key: f"xx{key}yy",
    "its first half": lambda key: f"Not {key[: len(key) // 2]}",
    "its second half": lambda key: f"Not {key[len(key) // 2 :]}",
    "a part of it": lambda key: f"Not «{key[len(key) // 3 : 2 * len(key) // 3 + 2]}» so",
    "in capitals": lambda key: f"Not {key.upper()}",
    "masked": lambda key: f"Not {key[:8]}{'*' * 30}{key[-4:]}.",
    "masked with dots": lambda key: f"Not {key[:8]}...{key[-4:]}, but another",
    "its beginning and end": lambda key: f"Not {key[:2]}***{key[-2:]}.",
    "again and again": lambda key: key * 10,
    "at the end of a long text": lambda key: "word " * 397 + key,
    "over two lines": lambda key: f"Not {key[:20]}\n{key[20:]}",
    "beside a letter that grows in lower case": lambda key: (
        f"\N{LATIN CAPITAL LETTER I WITH DOT ABOVE} {key}"
    ),
    "in a header": lambda key: f"Authorization: Bearer {key}",
}
# Keys of any form: some that no pattern of ours knows.
SECRETS = (
    KEY,
    "0a1b2c3d" * 5,
    "correct.horse-battery",
    "ABCDEFGH",
    "x" * 1024,
    "a+b/c=d:e@f!g#h$i%j^k&l*m(n)o",
)


@pytest.mark.parametrize("name", QUOTES)
@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:8])
async def test_the_key_is_struck_out_of_its_words(
    server: Providers, openai: Provider, checks: ProviderChecks, name: str, secret: str
) -> None:
    server.will(play.answer(401, {"error": {"message": QUOTES[name](secret)}}), secret)
    checked = await checks.check(openai, Secret(secret))
    assert checked.result is INVALID
    assert_clean(checked.message, secret)
    if name not in {"at the end of a long text", "its beginning and end"}:
        assert "***" in checked.message
    assert len(checked.message) < 400


DISGUISES: dict[str, Callable[[str], str]] = {
    "spaced out": lambda key: " ".join(key),
    "in groups": lambda key: " / ".join(key[start : start + 4] for start in range(0, len(key), 4)),
    "percent-encoded": lambda key: "".join(f"%{ord(character):02x}" for character in key),
    "backwards": lambda key: key[::-1],
    "backwards and spaced out": lambda key: "-".join(key[::-1]),
}


@pytest.mark.parametrize("name", DISGUISES)
@pytest.mark.parametrize("secret", [KEY, "0a1b2c3d" * 4, "correct.horse-battery"])
async def test_words_that_hide_the_key_are_not_kept(
    server: Providers, openai: Provider, checks: ProviderChecks, name: str, secret: str
) -> None:
    server.will(play.answer(401, {"error": {"message": f"Not {DISGUISES[name](secret)}!"}}), secret)
    assert (await checks.check(openai, Secret(secret))).message == f"{REFUSED} (401)."


async def test_another_secret_is_struck_out_too(
    server: Providers, openai: Provider, checks: ProviderChecks
) -> None:
    other = "sk-ant-api03-AbC123dEf456GhI789jKl"
    server.will(play.answer(401, {"error": {"message": f"Use {other} instead"}}), KEY)
    assert (await checks.check(openai, Secret(KEY))).message == f"{REFUSED} (401): Use *** instead."


async def test_words_without_a_secret_stay_as_they_are(
    server: Providers, openai: Provider, checks: ProviderChecks
) -> None:
    words = "The model `gpt-4o-mini-2024-07-18` is not for you… or is it? Ask ops@example.com (ключ, 鍵)."
    server.will(play.answer(401, {"error": {"message": words}}), KEY)
    assert (await checks.check(openai, Secret(KEY))).message == f"{REFUSED} (401): {words}"
