"""KeyService: what users bring, how their providers answer, and what decisions make of it."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import secrets
import string
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias
from uuid import UUID

import asyncpg
import grpc
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from keyturn.v1 import key_service_pb2 as pb
from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import routing_service_pb2 as routing
from keyturn_server.ids import new_id
from keyturn_server.keys.envelope import open_sealed
from keyturn_server.store.embedded import EmbeddedPostgres
from tests import providers as play
from tests.factories import KEYRING, Connection, Factory
from tests.providers import NOBODY, Providers
from tests.proxy import proxied
from tests.refusals import Refusal, contents, refused
from tests.support import MASTER_KEY, Fault, Sidecar, eventually

INLINE = routing.KEY_DELIVERY_INLINE
USABLE, UNVERIFIED = policy.KEY_STATE_USABLE, policy.KEY_STATE_UNVERIFIED
INVALID, INACTIVE = policy.KEY_STATE_INVALID, policy.KEY_STATE_INACTIVE
COOLING, UNREADABLE = policy.KEY_STATE_COOLING_DOWN, policy.KEY_STATE_UNREADABLE

# Ids and labels as people have them.
STRANGE = (
    "a b",
    "ключ",
    "鍵",
    "\N{KEY}\N{ZERO WIDTH JOINER}\N{KEY}",
    "' OR 1=1 --",
    "<b>&amp;",
    "%s{}",
    "e\N{COMBINING ACUTE ACCENT}",
)


def letters(count: int) -> str:
    alphabet = string.ascii_letters + string.digits
    return "".join(secrets.choice(alphabet) for _ in range(count))


# A key of each provider's form.
FORMS: dict[str, Callable[[], str]] = {
    "openai": lambda: f"sk-proj-{letters(40)}",
    "anthropic": lambda: f"sk-ant-api03-{letters(40)}",
    "google": lambda: f"AIza{letters(35)}",
    "mistral": lambda: letters(32),
    "groq": lambda: f"gsk_{letters(52)}",
    "xai": lambda: f"xai-{letters(80)}",
    "deepseek": lambda: f"sk-{letters(32)}",
    "openrouter": lambda: f"sk-or-v1-{letters(64)}",
    "together": lambda: letters(64),
    "fireworks": lambda: f"fw_{letters(24)}",
    "cohere": lambda: letters(40),
    "perplexity": lambda: f"pplx-{letters(48)}",
}


def a_key(provider: str = "openai") -> str:
    """A new secret of nobody's."""
    return FORMS[provider]()


async def save(
    sidecar: Sidecar, user_id: str, secret: str | None = None, **fields: Any
) -> pb.SaveKeyResponse:
    provider = fields.pop("provider", "openai")
    request = pb.SaveKeyRequest(
        user_id=user_id, provider=provider, secret=secret or a_key(provider), **fields
    )
    answer: pb.SaveKeyResponse = await sidecar.call("SaveKey", request)
    return answer


async def keys_of(sidecar: Sidecar, user_id: str, provider: str = "") -> list[pb.Key]:
    answer = await sidecar.call("ListKeys", pb.ListKeysRequest(user_id=user_id, provider=provider))
    return list(answer.keys)


async def ask_again(sidecar: Sidecar, user_id: str, key_id: object) -> pb.TestKeyResponse:
    answer: pb.TestKeyResponse = await sidecar.call(
        "TestKey", pb.TestKeyRequest(user_id=user_id, key_id=str(key_id))
    )
    return answer


async def update(sidecar: Sidecar, user_id: str, key_id: str, **fields: Any) -> pb.Key:
    answer = await sidecar.call("UpdateKey", pb.UpdateKeyRequest(user_id=user_id, key_id=key_id, **fields))
    key: pb.Key = answer.key
    return key


async def row_of(sql: Connection, key_id: str) -> dict[str, Any]:
    row = await sql.fetchrow("SELECT * FROM user_api_keys WHERE id = $1", UUID(key_id))
    assert row is not None
    return dict(row)


def opened(row: dict[str, Any]) -> str:
    """The secret that a row holds."""
    return open_sealed(
        KEYRING, row["encrypted_key"], user_id=row["user_id"], provider=row["provider"], row_id=row["id"]
    ).reveal()


def legacy(secret: str) -> str:
    """As the Node gateways stored a key."""
    iv = os.urandom(16)
    sealed = AESGCM(bytes.fromhex(MASTER_KEY)).encrypt(iv, secret.encode(), None)
    return base64.b64encode(iv + sealed[-16:] + sealed[:-16]).decode()


# -- SaveKey ------------------------------------------------------------------------------------------


async def test_a_key_is_checked_by_its_provider_and_saved(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers, subtests: pytest.Subtests
) -> None:
    for count, provider in enumerate(FORMS):
        with subtests.test(provider):
            user, secret = await make.user(), a_key(provider)
            before = datetime.now(UTC) - timedelta(seconds=5)
            saved = await save(sidecar, user, secret, provider=provider, label="work", priority=-3)
            seen = providers.seen[count]
            assert (seen.provider, seen.method, seen.key) == (provider, "GET", secret)
            assert not saved.replaced
            key = saved.key
            assert (key.provider, key.label, key.priority, key.hint) == (provider, "work", -3, secret[-4:])
            assert (key.is_active, key.state, key.last_error) == (True, USABLE, "")
            assert (key.total_requests, key.total_tokens) == (0, 0)
            for moment in (key.verify_time, key.create_time, key.update_time):
                assert before <= moment.ToDatetime(UTC) <= datetime.now(UTC) + timedelta(seconds=5)
            assert not key.HasField("last_use_time")
            assert not key.HasField("cooldown_until_time")
            assert UUID(key.key_id).version == 7
            assert await keys_of(sidecar, user) == [key]
            assert opened(await row_of(sql, key.key_id)) == secret
    assert len(providers.seen) == len(FORMS)


async def test_a_key_that_its_provider_refuses_is_kept_and_marked(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers, subtests: pytest.Subtests
) -> None:
    for provider in FORMS:
        with subtests.test(provider):
            user, secret = await make.user(micros=1_000_000), a_key(provider)
            providers.will(play.refuse, secret)
            key = (await save(sidecar, user, secret, provider=provider)).key
            status, _ = play.refusal_of(provider, secret)
            assert key.state == INVALID
            assert key.last_error.startswith(f"The provider refused the key ({status})")
            assert not key.HasField("verify_time")
            assert opened(await row_of(sql, key.key_id)) == secret
            assert (await sidecar.decide(user, provider)).WhichOneof("route") == "ticket"


TARGETS = {
    "openai": "/v1/models",
    "anthropic": "/v1/models?limit=1",
    "google": "/v1beta/models?pageSize=1",
    "mistral": "/v1/models",
    "groq": "/openai/v1/models",
    "xai": "/v1/models",
    "deepseek": "/models",
    "openrouter": "/api/v1/key",
    "together": "/v1/models",
    "fireworks": "/v1/accounts/fireworks/models?pageSize=1",
    "cohere": "/v1/models?page_size=1",
    "perplexity": "/v1/async/sonar",
}


async def test_each_provider_is_asked_in_its_own_way(
    sidecar: Sidecar, make: Factory, providers: Providers
) -> None:
    user = await make.user()
    for provider in FORMS:
        await save(sidecar, user, provider=provider)
    assert {seen.provider: seen.target for seen in providers.seen} == TARGETS
    versions = {seen.provider: seen.headers.get("anthropic-version") for seen in providers.seen}
    assert {provider: version for provider, version in versions.items() if version} == {
        "anthropic": "2023-06-01"
    }


UNCHECKED = {
    "an error of its own": play.fail,
    "a reset": play.reset,
    "no answer": play.close,
    "no HTTP": play.babble,
    "a redirect": play.redirect,
}


@pytest.mark.parametrize("name", UNCHECKED)
async def test_a_key_that_could_not_be_checked_is_kept_and_used(
    sidecar: Sidecar, make: Factory, providers: Providers, name: str
) -> None:
    user, secret = await make.user(), a_key()
    providers.will(UNCHECKED[name], secret)
    key = (await save(sidecar, user, secret)).key
    assert (key.state, key.last_error, key.HasField("verify_time")) == (UNVERIFIED, "", False)
    assert (await sidecar.decide(user, key_delivery=INLINE)).key.secret == secret
    (line,) = [json.loads(line) for line in sidecar.log.getvalue().splitlines() if "key_unverified" in line]
    assert (line["level"], line["provider"]) == ("warning", "openai")
    assert len(providers.seen) == 1


async def test_a_provider_that_hangs_is_not_waited_for(
    start_sidecar: Callable[..., Any], make: Factory, providers: Providers
) -> None:
    sidecar, user, secret = await start_sidecar(provider_timeout=0.3), await make.user(), a_key()
    providers.will(play.hang, secret)
    assert (await save(sidecar, user, secret)).key.state == UNVERIFIED


async def test_a_provider_that_nobody_can_reach_leaves_a_key_unverified(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    user = await make.user()
    await sql.execute(
        "INSERT INTO api_providers (id, name, base_url, check_path) VALUES ('acme', 'Acme', $1, 'models')",
        NOBODY,
    )
    await until_known(sidecar, "acme")
    key = (await save(sidecar, user, "a-key-of-acme", provider="acme")).key
    assert key.state == UNVERIFIED


async def test_a_provider_that_asks_for_patience_knows_the_key(
    sidecar: Sidecar, make: Factory, providers: Providers
) -> None:
    user, secret = await make.user(), a_key()
    providers.will(play.limit, secret)
    key = (await save(sidecar, user, secret)).key
    assert (key.state, key.HasField("verify_time")) == (USABLE, True)


async def test_a_key_without_permission_is_invalid_and_says_why(
    sidecar: Sidecar, make: Factory, providers: Providers
) -> None:
    user, secret = await make.user(), a_key()
    providers.will(play.forbid, secret)
    key = (await save(sidecar, user, secret)).key
    assert key.state == INVALID
    assert "Missing scopes: model.read" in key.last_error


async def until_known(sidecar: Sidecar, provider: str) -> pb.Provider:
    """The provider, once the sidecar has heard of it."""

    async def known() -> pb.Provider | None:
        listed = (await sidecar.call("ListProviders", pb.ListProvidersRequest())).providers
        return next((each for each in listed if each.provider_id == provider), None)

    found: pb.Provider = await eventually(known)
    return found


async def test_adding_a_provider_that_is_checked_is_adding_a_row(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    user = await make.user()
    await sql.execute(
        "INSERT INTO api_providers (id, name, base_url, auth_header, auth_prefix, key_pattern, check_path, "
        "check_headers, check_refusal) VALUES ('acme', 'Acme AI', $1, 'Authorization', 'Bearer ', "
        "'^acme-\\d+$', '../whoami', '{\"X-Client\": \"keyturn\"}', 'no such key')",
        f"{providers.url}/acme/v7",
    )
    assert (await until_known(sidecar, "acme")).is_checkable
    assert (await save(sidecar, user, "acme-1", provider="acme")).key.state == USABLE
    providers.will(play.answer(422, {"message": "There is NO SUCH KEY."}), "acme-2")
    key = (await save(sidecar, user, "acme-2", provider="acme", label="2")).key
    assert (key.state, key.last_error) == (
        INVALID,
        "The provider refused the key (422): There is NO SUCH KEY.",
    )
    seen = providers.seen[0]
    assert (seen.target, seen.headers["x-client"]) == ("/whoami", "keyturn")


async def test_a_provider_without_a_way_to_check_is_not_asked(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    user = await make.user()
    await sql.execute(
        "INSERT INTO api_providers (id, name, base_url) VALUES ('acme', 'Acme', $1)", f"{providers.url}/acme"
    )
    assert not (await until_known(sidecar, "acme")).is_checkable
    key = (await save(sidecar, user, "a-key-of-acme", provider="acme")).key
    assert key.state == UNVERIFIED
    answer = await ask_again(sidecar, user, key.key_id)
    assert (answer.check, answer.message) == (
        pb.KEY_CHECK_UNVERIFIED,
        "Keys of this provider cannot be checked.",
    )
    assert providers.seen == []


@pytest.mark.parametrize("label", ["", *STRANGE])
async def test_the_same_label_again_replaces_the_secret(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers, label: str
) -> None:
    user = await make.user(name=f"user of {label}")
    old, new = a_key(), a_key()
    first = await save(sidecar, user, old, label=label, priority=7)
    await sql.execute(
        "UPDATE user_api_keys SET is_active = false, is_valid = false, last_error = 'x', "
        "last_error_at = now(), cooldown_until = now() + interval '1 hour', total_requests = 5, "
        "total_tokens = 70, last_used_at = now()"
    )
    again = await save(sidecar, user, new, label=label)
    assert (first.replaced, again.replaced) == (False, True)
    key = again.key
    assert (key.key_id, key.label, key.priority, key.hint) == (first.key.key_id, label, 7, new[-4:])
    assert (key.state, key.is_active, key.last_error) == (USABLE, True, "")
    assert not key.HasField("cooldown_until_time")
    assert (key.total_requests, key.total_tokens, key.create_time) == (5, 70, first.key.create_time)
    assert key.update_time.ToDatetime() > first.key.update_time.ToDatetime()
    row = await row_of(sql, key.key_id)
    assert (opened(row), row["revision"], row["last_error_at"]) == (new, 2, None)
    assert (await save(sidecar, user, label=label, priority=0)).key.priority == 0
    assert await sql.fetchval("SELECT count(*) FROM user_api_keys") == 1


@pytest.mark.parametrize(
    ("behaviour", "state"), [(play.refuse, INVALID), (play.fail, UNVERIFIED), (play.accept, USABLE)]
)
async def test_what_is_known_of_a_key_is_of_its_present_secret(
    sidecar: Sidecar, make: Factory, providers: Providers, behaviour: play.Behaviour, state: int
) -> None:
    user = await make.user()
    refused_one, new = a_key(), a_key()
    providers.will(play.refuse, refused_one)
    providers.will(behaviour, new)
    for first in (a_key(), refused_one):
        await save(sidecar, user, first)
        key = (await save(sidecar, user, new)).key
        assert key.state == state
        assert bool(key.last_error) == (state == INVALID)
        assert key.HasField("verify_time") == (state == USABLE)


async def test_a_label_is_one_of_its_provider(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    saved = [await save(sidecar, user, provider=provider, label="main") for provider in ("openai", "xai")]
    assert [each.replaced for each in saved] == [False, False]


async def test_the_outcome_of_an_earlier_secret_says_nothing_of_the_new_one(
    sidecar: Sidecar, make: Factory
) -> None:
    user = await make.user()
    await save(sidecar, user)
    decision = await sidecar.decide(user)
    await save(sidecar, user)
    await sidecar.record(decision, routing.OUTCOME_AUTH_REJECTED)
    (key,) = await keys_of(sidecar, user)
    assert (key.state, key.total_requests) == (USABLE, 1)


@pytest.mark.parametrize(
    ("secret", "hint"), [("x" * 15 + "y", "xxxy"), ("abcdefghijkl", "jkl"), ("abcdefgh", "gh"), ("abc", "")]
)
async def test_a_hint_is_no_more_than_a_quarter_of_the_secret(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers, secret: str, hint: str
) -> None:
    user = await make.user()
    await sql.execute(
        "INSERT INTO api_providers (id, name, base_url, key_pattern) VALUES ('acme', 'Acme', '', '.*')"
    )
    await until_known(sidecar, "acme")
    assert (await save(sidecar, user, secret, provider="acme")).key.hint == hint


# -- refusals of SaveKey ------------------------------------------------------------------------------

Case: TypeAlias = tuple[dict[str, Any], str, str]
CONTROLS = ("a\0b", "\x1b[31m", "line\nbreak", "tab\t", "\x7f", "\x85")


def too_long(field: str, most: int) -> list[Case]:
    limit = f"At most {most} characters; this has {most + 1}."
    return [
        ({field: "x" * (most + 1)}, field, limit),
        ({field: "\N{GRINNING FACE}" * (most + 1)}, field, limit),
        *(({field: text}, field, "Control characters") for text in CONTROLS),
    ]


PRIORITIES: list[Case] = [
    ({"priority": value}, "priority", f"From -1000000 to 1000000; this is {value}.")
    for value in (-1_000_001, 1_000_001, -(2**31), 2**31 - 1)
]
USERS: list[Case] = [({"user_id": ""}, "user_id", "Required."), *too_long("user_id", 128)]
KEY_IDS: list[Case] = [
    ({"key_id": ""}, "key_id", "Required."),
    *(
        ({"key_id": text}, "key_id", "Not a UUID")
        for text in (
            "1",
            "x" * 36,
            "0192f3a4-5b6c-7d8e-9f01-23456789abcde",
            "{0192f3a4-5b6c-7d8e-9f01-23456789abcd}",
            "urn:uuid:0192f3a4-5b6c-7d8e-9f01-23456789abcd",
            "0192f3a45b6c7d8e9f0123456789abcd",
            "0192f3a4-5b6c-7d8e-9f01-23456789abc\0",
            "٠192f3a4-5b6c-7d8e-9f01-23456789abcd",
            "9" * 60_000,
        )
    ),
]
SAVE: list[Case] = [
    *USERS,
    ({"provider": ""}, "provider", "Required."),
    *too_long("provider", 64),
    ({"provider": "acme"}, "provider", "no such provider"),
    ({"provider": "OpenAI"}, "provider", "no such provider"),
    ({"secret": ""}, "secret", "Required."),
    ({"secret": "sk-" + "x" * 1022}, "secret", "At most 1024 characters; this has 1025."),
    *(
        ({"secret": f"sk-{'x' * 20}{text}"}, "secret", "Printable ASCII characters without spaces only.")
        for text in ("\n", "\r\nhost: evil", " ", "\0", "é", "\N{KEY}", "\u200b", "\t")
    ),
    ({"secret": " sk-" + "x" * 20}, "secret", "Printable ASCII"),
    *(
        ({"secret": text}, "secret", "Not like a key of OpenAI: those match ^sk-")
        for text in (
            "sk-short",
            "AIza" + "x" * 35,
            "xsk-" + "x" * 20,
            "sk-" + "x" * 20 + "/",
            "sk-" + "x" * 256,
        )
    ),
    *too_long("label", 128),
    *PRIORITIES,
]


async def test_a_key_that_breaks_a_limit_is_refused_by_name_and_leaves_no_trace(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers, subtests: pytest.Subtests
) -> None:
    good = {"user_id": await make.user(), "provider": "openai", "secret": a_key()}
    before = await contents(sql)
    for fields, field, sentence in SAVE:
        with subtests.test(repr(fields)[:60]):
            refusal = await refused(sidecar, "SaveKey", pb.SaveKeyRequest(**{**good, **fields}))
            refusal.check_field(field, sentence)
            for secret in (good["secret"], fields.get("secret")):
                assert not secret or secret not in refusal.message
    assert await contents(sql) == before
    assert providers.seen == []


async def test_all_that_is_wrong_is_told_at_once(sidecar: Sidecar) -> None:
    request = pb.SaveKeyRequest(secret="a b", label="\n", priority=2**30)
    fields = (await refused(sidecar, "SaveKey", request)).fields
    assert fields.keys() == {"user_id", "provider", "secret", "label", "priority"}


async def test_the_longest_that_is_allowed_is_taken(sidecar: Sidecar, make: Factory, sql: Connection) -> None:
    user = await make.user(name="\N{GRINNING FACE}" * 128)
    await sql.execute("UPDATE api_providers SET key_pattern = '.+' WHERE id = 'openai'")

    async def pushed() -> bool:
        return (await until_known(sidecar, "openai")).key_pattern == ".+"

    await eventually(pushed)
    label = "\N{KEY}" * 128
    for priority in (-1_000_000, 1_000_000):
        key = (await save(sidecar, user, "~" * 1024, label=label, priority=priority)).key
        assert (key.label, key.priority, key.hint) == (label, priority, "~~~~")


Setting: TypeAlias = tuple[str, dict[str, Any], grpc.StatusCode, str, str]
FAILED = grpc.StatusCode.FAILED_PRECONDITION
# What the world is like, settings of the sidecar, the refusal, and a part of its sentence.
WORLDS: dict[str, Setting] = {
    "nobody by that id": (
        "DELETE FROM users", {}, grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND", "no such user"
    ),
    "without a master key": (
        "SELECT", {"encryption_key": None}, FAILED, "ENCRYPTION_NOT_CONFIGURED", "no ENCRYPTION_KEY"
    ),
    "the flag is off": (
        "UPDATE feature_flags SET is_enabled = false WHERE key = 'byok_enabled'",
        {}, FAILED, "BYOK_DISABLED", "byok_enabled is false",
    ),
    "below the tier": (
        "UPDATE users SET subscription_tier = 'free'",
        {}, FAILED, "TIER_NOT_ELIGIBLE", "this user's is 'free'",
    ),
    "a tier that nobody knows": (
        "UPDATE users SET subscription_tier = 'gold'",
        {}, FAILED, "TIER_NOT_ELIGIBLE", "this user's is 'gold'",
    ),
    "the flag asks for more": (
        "UPDATE feature_flags SET min_tier = 'lifetime' WHERE key = 'byok_enabled'",
        {}, FAILED, "TIER_NOT_ELIGIBLE", "for the tier 'lifetime' and above",
    ),
    "the provider is off": (
        "UPDATE api_providers SET is_enabled = false WHERE id = 'openai'",
        {}, FAILED, "PROVIDER_DISABLED", "'openai' is switched off",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORLDS)
async def test_where_no_key_can_be_saved_the_reason_is_told_and_nothing_is_written(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, providers: Providers, name: str
) -> None:
    change, settings, code, reason, sentence = WORLDS[name]
    user = await make.user("premium")
    await sql.execute(change)
    sidecar = await start_sidecar(**settings)
    before = await contents(sql)
    request = pb.SaveKeyRequest(user_id=user, provider="openai", secret=a_key())
    refusal = await refused(sidecar, "SaveKey", request)
    refusal.check(code, reason, *(["ResourceInfo"] if code is grpc.StatusCode.NOT_FOUND else []))
    assert sentence in refusal.message
    assert await contents(sql) == before
    assert providers.seen == []


async def test_the_first_thing_that_stands_in_the_way_is_the_one_that_is_told(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    user = await make.user("free")
    sidecar = await start_sidecar(encryption_key=None)
    await sql.execute("UPDATE api_providers SET is_enabled = false WHERE id = 'openai'")
    await sql.execute("UPDATE feature_flags SET is_enabled = false WHERE key = 'byok_enabled'")

    async def reason(**fields: Any) -> str:
        good = {"user_id": user, "provider": "openai", "secret": "unlike a key"}
        refusal = await refused(sidecar, "SaveKey", pb.SaveKeyRequest(**{**good, **fields}))
        return str(refusal.info.reason)

    async def comes_to(expected: str, **fields: Any) -> None:
        async def is_so() -> bool:
            return await reason(**fields) == expected

        await eventually(is_so)

    secret = {"secret": "unlike-a-key"}
    await comes_to("INVALID_FIELD", user_id="nobody")
    await comes_to("USER_NOT_FOUND", user_id="nobody", provider="acme", **secret)
    await comes_to("INVALID_FIELD", provider="acme", **secret)
    await comes_to("PROVIDER_DISABLED", **secret)
    await sql.execute("UPDATE api_providers SET is_enabled = true WHERE id = 'openai'")
    await comes_to("ENCRYPTION_NOT_CONFIGURED", **secret)
    sidecar = await start_sidecar()
    await comes_to("BYOK_DISABLED", **secret)
    await sql.execute("UPDATE feature_flags SET is_enabled = true WHERE key = 'byok_enabled'")
    await comes_to("TIER_NOT_ELIGIBLE", **secret)
    await sql.execute("UPDATE users SET subscription_tier = 'premium'")
    for _ in range(10):
        await make.key(user)
    await comes_to("INVALID_FIELD", **secret)
    await comes_to("TOO_MANY_KEYS", secret=a_key())


async def test_ten_keys_for_a_provider_are_all(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    user = await make.user()
    for number in range(10):
        await save(sidecar, user, label=str(number))
    before = await contents(sql)
    request = pb.SaveKeyRequest(user_id=user, provider="openai", secret=a_key(), label="10")
    refusal = (await refused(sidecar, "SaveKey", request)).check(FAILED, "TOO_MANY_KEYS")
    assert refusal.message == "A user has at most 10 keys for the provider 'openai': delete one first."
    assert await contents(sql) == before
    assert len(providers.seen) == 10
    assert (await save(sidecar, user, label="3")).replaced, "replacing one is not one more"
    assert not (await save(sidecar, user, provider="xai", label="10")).replaced
    assert not (await save(sidecar, await make.user(), label="10")).replaced
    (first, *_) = await keys_of(sidecar, user, "openai")
    await sidecar.call("DeleteKey", pb.DeleteKeyRequest(user_id=user, key_id=first.key_id))
    assert not (await save(sidecar, user, label="10")).replaced


async def test_a_hundred_keys_are_all(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    for number in range(100):
        await make.key(user, list(FORMS)[number % 12], label=str(number), secret="sk-test-0123456789abcdef")
    request = pb.SaveKeyRequest(user_id=user, provider="openai", secret=a_key(), label="new")
    refusal = (await refused(sidecar, "SaveKey", request)).check(FAILED, "TOO_MANY_KEYS")
    assert refusal.message == "A user has at most 100 keys: delete one first."
    assert (await save(sidecar, user, label="0")).replaced
    assert len(await keys_of(sidecar, user)) == 100


@pytest.mark.parametrize("pattern", ["[", "(?P<", "a{99999999999999}", "(" * 5000 + ")" * 5000])
async def test_a_pattern_that_is_none_stops_nobody_and_is_told_to_operators(
    sidecar: Sidecar, make: Factory, sql: Connection, pattern: str
) -> None:
    user = await make.user()
    await sql.execute("UPDATE api_providers SET key_pattern = $1 WHERE id = 'openai'", pattern)

    async def pushed() -> bool:
        return (await until_known(sidecar, "openai")).key_pattern == pattern

    await eventually(pushed)
    assert (await save(sidecar, user, "anything")).key.state == USABLE
    (line,) = [
        json.loads(line) for line in sidecar.log.getvalue().splitlines() if "key_pattern_broken" in line
    ]
    assert (line["level"], line["provider"]) == ("error", "openai")
    request = pb.SaveKeyRequest(user_id=user, provider="openai", secret="a\nb")
    (await refused(sidecar, "SaveKey", request)).check_field("secret", "Printable ASCII")


BAD_ROWS = {
    "another host": "check_path = 'https://elsewhere.example/models'",
    "another host, of the same scheme": "check_path = '//elsewhere.example/models'",
    "headers that are no object": "check_headers = '[]'",
    "headers that are no texts": """check_headers = '{"a": 1}'""",
    "a refusal that everything says": "check_refusal = ''",
}


@pytest.mark.parametrize("name", BAD_ROWS)
async def test_a_row_that_would_lead_a_key_astray_cannot_be_written(sql: Connection, name: str) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await sql.execute(f"UPDATE api_providers SET {BAD_ROWS[name]} WHERE id = 'openai'")


# -- decisions ----------------------------------------------------------------------------------------


async def test_a_saved_key_is_used_at_once_here_and_within_the_push_elsewhere(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    lasting = {"flag_ttl": 3600, "profile_ttl": 3600, "unpushed_ttl": 3600}
    here, elsewhere = await start_sidecar(**lasting), await start_sidecar(**lasting)
    user = await make.user(micros=1_000_000)

    async def secret_at(sidecar: Sidecar) -> str:
        return (await sidecar.decide(user, key_delivery=INLINE)).key.secret

    async def is_elsewhere(secret: str) -> None:
        async def there() -> bool:
            return await secret_at(elsewhere) == secret

        await eventually(there)

    for sidecar in (here, elsewhere):
        assert await secret_at(sidecar) == ""
    first, second = a_key(), a_key()
    key = (await save(here, user, first)).key
    assert await secret_at(here) == first
    await is_elsewhere(first)
    await save(here, user, second)
    assert await secret_at(here) == second
    await is_elsewhere(second)
    await update(here, user, key.key_id, is_active=False)
    assert await secret_at(here) == ""
    await is_elsewhere("")
    await update(here, user, key.key_id, is_active=True)
    assert await secret_at(here) == second
    await is_elsewhere(second)
    await here.call("DeleteKey", pb.DeleteKeyRequest(user_id=user, key_id=key.key_id))
    assert await secret_at(here) == ""
    await is_elsewhere("")


async def test_a_sidecar_reads_its_own_changes_without_the_push(
    start_sidecar: Callable[..., Any], make: Factory, database: str, cluster: EmbeddedPostgres
) -> None:
    async with proxied(cluster) as proxy:
        sidecar = await start_sidecar(
            database_url=proxy.dsn(database), push_beat=3600, flag_ttl=3600, profile_ttl=3600
        )
        proxy.silence(push_only=True)
        user = await make.user(micros=1_000_000)

        async def hint() -> str:
            return str((await sidecar.decide(user)).key.hint)

        assert await hint() == ""
        key = (await save(sidecar, user)).key
        assert await hint() == key.hint
        await update(sidecar, user, key.key_id, is_active=False)
        assert await hint() == ""
        await make.connection.execute("UPDATE user_api_keys SET is_active = true, is_valid = false")
        assert await hint() == ""
        await ask_again(sidecar, user, key.key_id)
        assert await hint() == key.hint
        await sidecar.call("DeleteKey", pb.DeleteKeyRequest(user_id=user, key_id=key.key_id))
        assert await hint() == ""


async def test_a_handle_of_a_replaced_secret_gives_up_neither(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    await save(sidecar, user)
    handle = (await sidecar.decide(user)).key.handle
    await save(sidecar, user)
    refusal = await refused(sidecar, "Redeem", routing.RedeemRequest(key_handle=handle))
    assert refusal.info.reason == "KEY_UNUSABLE"


# -- ListKeys -----------------------------------------------------------------------------------------


async def test_keys_are_listed_by_provider_in_the_order_in_which_they_are_tried(
    sidecar: Sidecar, make: Factory
) -> None:
    user, other = await make.user(), await make.user()
    for provider, label, priority in (
        ("xai", "second", 1), ("openai", "third", 5), ("xai", "first", 0), ("openai", "first", -5),
        ("openai", "second", 5), ("xai", "third", 1),
    ):  # fmt: skip
        await make.key(user, provider, label=label, priority=priority)
    await make.key(other)
    listed = [(key.provider, key.label) for key in await keys_of(sidecar, user)]
    # Among equals the older one comes first.
    assert listed == [
        ("openai", "first"), ("openai", "third"), ("openai", "second"),
        ("xai", "first"), ("xai", "second"), ("xai", "third"),
    ]  # fmt: skip
    assert [key.label for key in await keys_of(sidecar, user, "xai")] == ["first", "second", "third"]
    assert await keys_of(sidecar, user, "groq") == []
    assert await keys_of(sidecar, await make.user()) == []


HOUR = timedelta(hours=1)
NOW = datetime.now(UTC)
STATES: dict[str, tuple[dict[str, Any], int]] = {
    "verified": ({"verified_at": NOW}, USABLE),
    "never verified": ({}, UNVERIFIED),
    "no longer cooling down": ({"cooldown_until": NOW - HOUR}, UNVERIFIED),
    "does not open": ({"encrypted_key": "v1.0123456789abcdef.AAAA"}, UNREADABLE),
    "is no ciphertext": ({"encrypted_key": "sk-plain", "verified_at": NOW}, UNREADABLE),
    "cooling down, and does not open": (
        {"cooldown_until": NOW + HOUR, "encrypted_key": "x"}, COOLING,
    ),
    "invalid and cooling down": ({"is_valid": False, "cooldown_until": NOW + HOUR}, INVALID),
    "all at once": (
        {"is_active": False, "is_valid": False, "cooldown_until": NOW + HOUR, "encrypted_key": "x"}, INACTIVE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
async def test_a_list_says_whether_a_key_can_be_used_now(sidecar: Sidecar, make: Factory, name: str) -> None:
    columns, state = STATES[name]
    user = await make.user(micros=1_000_000)
    await make.key(user, **columns)
    (key,) = await keys_of(sidecar, user)
    assert key.state == state
    assert key.is_active == columns.get("is_active", True)
    cooldown = columns.get("cooldown_until")
    cools = cooldown is not None and cooldown > datetime.now(UTC)
    assert key.HasField("cooldown_until_time") == cools
    if cools:
        assert key.cooldown_until_time.ToDatetime(UTC) == cooldown
    used = (await sidecar.decide(user)).WhichOneof("route") == "key"
    assert used == (state in {USABLE, UNVERIFIED}), "a decision finds the same"


async def test_without_a_master_key_no_key_is_called_usable(
    start_sidecar: Callable[..., Any], make: Factory, providers: Providers
) -> None:
    user = await make.user()
    key_id = await make.key(user, verified_at=datetime.now(UTC))
    await make.key(user, is_active=False)
    sidecar = await start_sidecar(encryption_key=None)
    assert sorted(key.state for key in await keys_of(sidecar, user)) == sorted([UNREADABLE, INACTIVE])
    request = pb.TestKeyRequest(user_id=user, key_id=str(key_id))
    (await refused(sidecar, "TestKey", request)).check(FAILED, "ENCRYPTION_NOT_CONFIGURED")
    # What needs no secret goes on.
    assert not (await update(sidecar, user, str(key_id), is_active=False)).is_active
    await sidecar.call("DeleteKey", pb.DeleteKeyRequest(user_id=user, key_id=str(key_id)))
    assert providers.seen == []


async def test_what_a_key_was_used_for_is_listed(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    await save(sidecar, user)
    usage = routing.Usage(input_tokens=30, output_tokens=12)
    await sidecar.record(await sidecar.decide(user), routing.OUTCOME_SUCCESS, usage=usage)
    (key,) = await keys_of(sidecar, user)
    assert (key.total_requests, key.total_tokens, key.HasField("last_use_time")) == (1, 42, True)
    before = key.update_time
    await sidecar.record(await sidecar.decide(user), routing.OUTCOME_AUTH_REJECTED, error_message="No.")
    (key,) = await keys_of(sidecar, user)
    assert (key.state, key.last_error, key.update_time) == (INVALID, "No.", before)


# -- keys of the Node gateways ------------------------------------------------------------------------


async def test_a_key_of_the_node_gateways_is_listed_tested_and_replaced(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    user, old, new = await make.user(), a_key(), a_key()
    key_id = await make.key(
        user, label="main", key_hint="", encrypted_key=legacy(old), last_error=f"Not {old}, no."
    )
    (key,) = await keys_of(sidecar, user)
    assert (key.key_id, key.state, key.hint, key.last_error) == (str(key_id), UNVERIFIED, "", "Not ***, no.")
    answer = await ask_again(sidecar, user, key_id)
    assert (answer.check, answer.key.state, providers.seen[0].key) == (pb.KEY_CHECK_VALID, USABLE, old)
    answer2 = await save(sidecar, user, new, label="main")
    assert (answer2.replaced, answer2.key.key_id, answer2.key.hint) == (True, str(key_id), new[-4:])
    row = await row_of(sql, str(key_id))
    assert row["encrypted_key"].startswith("v1.")
    assert opened(row) == new


async def test_a_legacy_key_that_no_header_can_carry_is_not_sent(
    sidecar: Sidecar, make: Factory, providers: Providers
) -> None:
    user = await make.user()
    key_id = await make.key(user, encrypted_key=legacy("sk-0123456789abcdef\r\nhost: evil"))
    answer = await ask_again(sidecar, user, key_id)
    assert answer.check == pb.KEY_CHECK_UNVERIFIED
    assert "cannot stand in an HTTP header" in answer.message
    assert providers.seen == []


# -- UpdateKey and DeleteKey --------------------------------------------------------------------------


async def test_what_is_given_is_changed_and_nothing_else(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    user = await make.user()
    key = (await save(sidecar, user, label="main", priority=3)).key
    before = await row_of(sql, key.key_id)
    changes: list[dict[str, Any]] = [
        {"is_active": False},
        {"priority": -7},
        {"label": ""},
        {"label": "ключ", "priority": 0, "is_active": True},
    ]
    for change in changes:
        found = await update(sidecar, user, key.key_id, **change)
        after = await row_of(sql, key.key_id)
        assert {name for name in after if after[name] != before[name]} <= {*change, "updated_at"}
        for name, value in change.items():
            assert after[name] == getattr(found, name) == value
        assert after["updated_at"] > before["updated_at"]
        before = after
    assert len(providers.seen) == 1


async def test_a_label_that_another_key_has_is_refused(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    await save(sidecar, user, label="main")
    key = (await save(sidecar, user, label="spare")).key
    other = (await save(sidecar, user, provider="xai", label="xai")).key
    before = await contents(sql)
    request = pb.UpdateKeyRequest(user_id=user, key_id=key.key_id, label="main", priority=9)
    (await refused(sidecar, "UpdateKey", request)).check(grpc.StatusCode.ALREADY_EXISTS, "LABEL_TAKEN")
    assert await contents(sql) == before
    assert (await update(sidecar, user, key.key_id, label="spare")).label == "spare"
    assert (await update(sidecar, user, other.key_id, label="main")).label == "main"


UPDATE: list[Case] = [
    *((fields, field, why) for fields, field, why in [*USERS, *KEY_IDS]),
    *too_long("label", 128),
    *PRIORITIES,
    ({"is_active": None}, "is_active", "At least one of is_active, priority and label is required."),
]


@pytest.mark.parametrize("method", ["UpdateKey", "DeleteKey", "TestKey"])
async def test_a_change_that_breaks_a_limit_is_refused_by_name_and_changes_nothing(
    sidecar: Sidecar, make: Factory, sql: Connection, method: str, subtests: pytest.Subtests
) -> None:
    user = await make.user()
    good: dict[str, Any] = {"user_id": user, "key_id": str(await make.key(user))}
    kind = getattr(pb, f"{method}Request")
    if method == "UpdateKey":
        good["is_active"] = False
    before = await contents(sql)
    for fields, field, sentence in UPDATE if method == "UpdateKey" else [*USERS, *KEY_IDS]:
        with subtests.test(repr(fields)[:60]):
            (await refused(sidecar, method, kind(**{**good, **fields}))).check_field(field, sentence)
    assert await contents(sql) == before


async def test_a_list_that_breaks_a_limit_is_refused_by_name(
    sidecar: Sidecar, make: Factory, subtests: pytest.Subtests
) -> None:
    good = {"user_id": await make.user()}
    cases = [*USERS, *too_long("provider", 64), ({"provider": "acme"}, "provider", "no such provider")]
    for fields, field, sentence in cases:
        with subtests.test(repr(fields)[:60]):
            request = pb.ListKeysRequest(**{**good, **fields})
            (await refused(sidecar, "ListKeys", request)).check_field(field, sentence)


@pytest.mark.parametrize("method", ["UpdateKey", "DeleteKey", "TestKey"])
async def test_a_key_is_only_its_owners(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers, method: str
) -> None:
    owner, other = await make.user(), await make.user()
    key_id = str(await make.key(owner))
    kind = getattr(pb, f"{method}Request")
    more = {"is_active": False} if method == "UpdateKey" else {}
    before = await contents(sql)

    async def refusal_of(user_id: str, key_id: str) -> Refusal:
        return await refused(sidecar, method, kind(user_id=user_id, key_id=key_id, **more))

    for user_id, wanted in ((other, key_id), (owner, str(new_id())), (owner, str(UUID(int=0)))):
        refusal = await refusal_of(user_id, wanted)
        refusal.check(grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND", "ResourceInfo")
        assert (refusal.resource.resource_type, refusal.resource.resource_name) == ("key", wanted)
    for nobody in ("nobody", owner.upper(), f"{owner} "):
        refusal = await refusal_of(nobody, key_id)
        refusal.check(grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND", "ResourceInfo")
        assert refusal.resource.resource_name == nobody
    assert await contents(sql) == before
    assert providers.seen == []


async def test_nobody_has_no_list(sidecar: Sidecar) -> None:
    refusal = await refused(sidecar, "ListKeys", pb.ListKeysRequest(user_id="nobody"))
    refusal.check(grpc.StatusCode.NOT_FOUND, "USER_NOT_FOUND", "ResourceInfo")


async def test_a_deleted_key_is_gone_and_what_it_was_used_for_is_not(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    key = (await save(sidecar, user)).key
    decision = await sidecar.decide(user)
    await sidecar.record(await sidecar.decide(user), routing.OUTCOME_SUCCESS)
    request = pb.DeleteKeyRequest(user_id=user, key_id=key.key_id.upper())
    assert await sidecar.call("DeleteKey", request) == pb.DeleteKeyResponse()
    assert await keys_of(sidecar, user) == []
    assert await sql.fetchval("SELECT count(*) FROM user_api_keys") == 0
    assert await sql.fetchval("SELECT count(*) FROM api_key_usage") == 1
    recorded = await sidecar.record(decision, routing.OUTCOME_SUCCESS)
    assert recorded.key_state == policy.KEY_STATE_DELETED
    (await refused(sidecar, "DeleteKey", request)).check(
        grpc.StatusCode.NOT_FOUND, "KEY_NOT_FOUND", "ResourceInfo"
    )


# -- TestKey ------------------------------------------------------------------------------------------


async def test_a_key_that_its_provider_takes_is_valid_again_and_a_cooldown_ends(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    user, secret = await make.user(), a_key()
    key_id = await make.key(
        user, secret=secret, is_valid=False, last_error="No.", last_error_at=datetime.now(UTC),
        cooldown_until=datetime.now(UTC) + HOUR,
    )  # fmt: skip
    (before,) = await keys_of(sidecar, user)
    answer = await ask_again(sidecar, user, key_id)
    assert (answer.check, answer.message) == (pb.KEY_CHECK_VALID, "The provider took the key.")
    key = answer.key
    assert (key.state, key.last_error, key.HasField("verify_time")) == (USABLE, "", True)
    assert not key.HasField("cooldown_until_time")
    assert key.update_time == before.update_time
    assert [seen.key for seen in providers.seen] == [secret]
    assert await keys_of(sidecar, user) == [key]
    assert (await sidecar.decide(user)).WhichOneof("route") == "key"


async def test_a_key_that_its_provider_refuses_becomes_invalid(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    user, secret = await make.user(), a_key()
    key = (await save(sidecar, user, secret)).key
    providers.will(play.refuse, secret)
    answer = await ask_again(sidecar, user, key.key_id)
    assert (answer.check, answer.key.state) == (pb.KEY_CHECK_INVALID, INVALID)
    assert answer.message == answer.key.last_error
    assert answer.message.startswith("The provider refused the key (401): Incorrect API key provided: ***.")
    assert answer.key.verify_time == key.verify_time, "when it last took it"
    assert answer.key.update_time == key.update_time
    row = await row_of(sql, key.key_id)
    assert (row["is_valid"], row["last_error_at"] is not None) == (False, True)
    assert (await sidecar.decide(user)).denial.reason == policy.DENIAL_REASON_KEY_UNUSABLE


@pytest.mark.parametrize("name", UNCHECKED)
async def test_a_provider_that_says_nothing_changes_nothing(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers, name: str
) -> None:
    user, secret = await make.user(), a_key()
    key_id = await make.key(
        user, secret=secret, is_valid=False, last_error="No.", cooldown_until=datetime.now(UTC) + HOUR
    )
    providers.will(UNCHECKED[name], secret)
    before = await contents(sql)
    answer = await ask_again(sidecar, user, key_id)
    assert (answer.check, answer.key.state) == (pb.KEY_CHECK_UNVERIFIED, INVALID)
    assert answer.message.startswith("The provider ")
    assert await contents(sql) == before


async def test_a_key_that_does_not_open_is_asked_about_nowhere(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    user = await make.user()
    whole = await make.key(user)
    moved = await sql.fetchval("SELECT encrypted_key FROM user_api_keys WHERE id = $1", whole)
    before = await contents(sql)
    ciphertexts = {
        "v1.0123456789abcdef.QUJD": "0123456789abcdef",
        moved: "does not open in this place",
        "sk-x": "",
    }
    for ciphertext, sentence in ciphertexts.items():
        key_id = await make.key(user, encrypted_key=ciphertext, verified_at=datetime.now(UTC))
        answer = await ask_again(sidecar, user, key_id)
        assert (answer.check, answer.key.state) == (pb.KEY_CHECK_UNREADABLE, UNREADABLE)
        assert sentence in answer.message
        assert answer.message.startswith("The stored key")
        assert answer.message.endswith(".")
        await sql.execute("DELETE FROM user_api_keys WHERE id = $1", key_id)
    assert await contents(sql) == before
    assert providers.seen == []


async def test_a_key_that_is_switched_off_is_tested_and_stays_so(sidecar: Sidecar, make: Factory) -> None:
    user = await make.user()
    key_id = await make.key(user, is_active=False, is_valid=False)
    answer = await ask_again(sidecar, user, key_id)
    assert (answer.check, answer.key.state, answer.key.is_active) == (pb.KEY_CHECK_VALID, INACTIVE, False)


async def test_a_key_of_a_provider_that_is_off_is_not_tested(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection, providers: Providers
) -> None:
    user = await make.user()
    key_id = await make.key(user)
    await sql.execute("UPDATE api_providers SET is_enabled = false WHERE id = 'openai'")
    sidecar = await start_sidecar()
    request = pb.TestKeyRequest(user_id=user, key_id=str(key_id))
    (await refused(sidecar, "TestKey", request)).check(FAILED, "PROVIDER_DISABLED")
    assert providers.seen == []


# -- ListProviders ------------------------------------------------------------------------------------


async def test_providers_are_listed_in_the_order_of_the_table_those_that_are_off_too(
    start_sidecar: Callable[..., Any], sql: Connection
) -> None:
    await sql.execute("UPDATE api_providers SET is_enabled = false WHERE id = 'xai'")
    await sql.execute("UPDATE api_providers SET check_path = NULL WHERE id = 'groq'")
    sidecar = await start_sidecar()
    listed = (await sidecar.call("ListProviders", pb.ListProvidersRequest())).providers
    rows = await sql.fetch("SELECT * FROM api_providers ORDER BY sort_order")
    assert len(listed) == 12
    for provider, row in zip(listed, rows, strict=True):
        assert provider == pb.Provider(
            provider_id=row["id"],
            name=row["name"],
            is_enabled=row["id"] != "xai",
            base_url=row["base_url"],
            auth_header=row["auth_header"],
            auth_prefix=row["auth_prefix"],
            key_pattern=row["key_pattern"],
            is_checkable=row["id"] != "groq",
        )


# -- many at once -------------------------------------------------------------------------------------


async def outcomes(*calls: Any) -> list[Any]:
    """What each call came to: its answer, or the reason of its refusal."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, Fault):
            raise one
    return [Refusal.of(one).info.reason if isinstance(one, Fault) else one for one in found]


async def test_fifty_saves_of_one_label_at_once_make_one_key(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecars = [await start_sidecar() for _ in range(2)]
    user = await make.user()
    given = [a_key() for _ in range(50)]
    answers = await outcomes(
        *(save(sidecars[number % 2], user, secret, label="one") for number, secret in enumerate(given))
    )
    assert [answer for answer in answers if isinstance(answer, str)] == []
    assert sorted(answer.replaced for answer in answers) == [False] + [True] * 49
    assert len({answer.key.key_id for answer in answers}) == 1
    (row,) = [dict(row) for row in await sql.fetch("SELECT * FROM user_api_keys")]
    assert row["revision"] == 50
    assert opened(row) in given
    assert row["key_hint"] == opened(row)[-4:]


async def test_the_limit_holds_when_many_are_saved_at_once(
    start_sidecar: Callable[..., Any], make: Factory, sql: Connection
) -> None:
    sidecars = [await start_sidecar() for _ in range(2)]
    user = await make.user()
    answers = await outcomes(*(save(sidecars[number % 2], user, label=str(number)) for number in range(30)))
    assert answers.count("TOO_MANY_KEYS") == 20
    assert sum(isinstance(answer, pb.SaveKeyResponse) for answer in answers) == 10
    assert await sql.fetchval("SELECT count(*) FROM user_api_keys") == 10


async def test_the_limit_of_all_keys_holds_when_many_are_saved_at_once(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    for number in range(96):
        await make.key(user, list(FORMS)[number % 12], secret="sk-test-0123456789abcdef")
    answers = await outcomes(*(save(sidecar, user, provider=p, label="new") for p in FORMS))
    assert sum(isinstance(answer, pb.SaveKeyResponse) for answer in answers) == 4
    assert answers.count("TOO_MANY_KEYS") == 8
    assert await sql.fetchval("SELECT count(*) FROM user_api_keys") == 100


async def test_saves_renames_and_deletions_at_once_leave_whole_rows(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user = await make.user()
    ids = [(await save(sidecar, user, label=label)).key.key_id for label in "abcd"]
    calls: list[Any] = []
    for number in range(10):
        calls += [
            save(sidecar, user, label="abcd"[number % 4]),
            update(sidecar, user, ids[number % 4], label="bcda"[number % 4]),
            update(sidecar, user, ids[(number + 1) % 4], priority=number),
            ask_again(sidecar, user, ids[(number + 2) % 4]),
            sidecar.decide(user),
        ]
    calls.append(sidecar.call("DeleteKey", pb.DeleteKeyRequest(user_id=user, key_id=ids[0])))
    answers = await outcomes(*calls)
    assert {answer for answer in answers if isinstance(answer, str)} <= {"LABEL_TAKEN", "KEY_NOT_FOUND"}
    listed = await keys_of(sidecar, user)
    assert {key.state for key in listed} == {USABLE}
    for key in listed:
        row = await row_of(sql, key.key_id)
        assert opened(row)[-4:] == key.hint


async def test_a_key_that_is_deleted_while_it_is_tested_stays_deleted(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    for times, behaviour in enumerate((play.accept, play.refuse, play.fail), start=1):
        user, secret, gate = await make.user(), a_key(), asyncio.Event()
        key_id = str(await make.key(user, secret=secret))
        providers.will(play.when(gate, behaviour), secret)
        testing = asyncio.create_task(ask_again(sidecar, user, key_id))
        await providers.asked(times)
        await sidecar.call("DeleteKey", pb.DeleteKeyRequest(user_id=user, key_id=key_id))
        gate.set()
        with pytest.raises(Fault) as caught:
            await testing
        assert Refusal.of(caught.value).info.reason == "KEY_NOT_FOUND"
        assert await sql.fetchval("SELECT count(*) FROM user_api_keys") == 0


@pytest.mark.parametrize("behaviour", [play.accept, play.refuse, play.fail])
async def test_what_comes_of_a_test_is_never_written_over_a_newer_secret(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers, behaviour: play.Behaviour
) -> None:
    user, old, new, gate = await make.user(), a_key(), a_key(), asyncio.Event()
    key_id = (await save(sidecar, user, old)).key.key_id
    providers.will(play.when(gate, behaviour), old)
    # The new one is the opposite of what the test will say of the old one.
    providers.will(play.refuse if behaviour is play.accept else play.accept, new)
    testing = asyncio.create_task(ask_again(sidecar, user, key_id))
    await providers.asked(2)
    replaced = await save(sidecar, user, new)
    before = await contents(sql)
    gate.set()
    answer = await testing
    assert answer.check == pb.KEY_CHECK_UNVERIFIED
    assert answer.message == "The secret was replaced while it was tested: test the new one."
    assert answer.key == replaced.key
    assert await contents(sql) == before


async def test_a_caller_that_hangs_up_while_the_provider_is_asked_saves_the_whole_key(
    sidecar: Sidecar, make: Factory, sql: Connection, providers: Providers
) -> None:
    user, secret, gate = await make.user(), a_key(), asyncio.Event()
    providers.will(play.when(gate, play.accept), secret)
    saving = asyncio.create_task(save(sidecar, user, secret))
    await providers.asked()
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    # Over the same connection, so the sidecar has heard of the cancellation before.
    assert await keys_of(sidecar, user) == []
    gate.set()

    async def saved() -> bool:
        return [key.state for key in await keys_of(sidecar, user)] == [USABLE]

    await eventually(saved)


async def until_it_waits_for_a_lock(sql: Connection) -> None:
    """Back when a statement of the sidecar waits for a lock that somebody else has."""

    async def waits() -> bool:
        # Not pg_stat_activity, of which a transaction sees one state only.
        return bool(await sql.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

    await eventually(waits)


async def test_what_another_writer_did_meanwhile_counts(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    for label, comes_to in (("theirs", "replaced"), ("ours", "TOO_MANY_KEYS")):
        user = await make.user()
        for number in range(9):
            await make.key(user, label=str(number))
        async with sql.transaction():
            await sql.execute("SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE", user)
            saving = asyncio.create_task(save(sidecar, user, label=label))
            await until_it_waits_for_a_lock(sql)
            await make.key(user, label="theirs")
        (answer,) = await outcomes(saving)
        assert answer == comes_to or getattr(answer, comes_to)
        assert len(await keys_of(sidecar, user)) == 10


async def test_a_users_row_that_somebody_keeps_locked_fails_the_save_alone(
    sidecar: Sidecar, make: Factory, sql: Connection
) -> None:
    user, other = await make.user(), await make.user()
    key_id = str(await make.key(user))
    async with sql.transaction():
        await sql.execute("SELECT FROM users WHERE id = $1 FOR NO KEY UPDATE", user)
        for method, request in (
            ("SaveKey", pb.SaveKeyRequest(user_id=user, provider="openai", secret=a_key())),
            ("UpdateKey", pb.UpdateKeyRequest(user_id=user, key_id=key_id, priority=1)),
            ("DeleteKey", pb.DeleteKeyRequest(user_id=user, key_id=key_id)),
            ("TestKey", pb.TestKeyRequest(user_id=user, key_id=key_id)),
        ):
            refusal = await refused(sidecar, method, request)
            refusal.check(grpc.StatusCode.UNAVAILABLE, "ROW_LOCKED", "RetryInfo")
        assert (await save(sidecar, other)).key.state == USABLE
        assert (await sidecar.decide(user)).WhichOneof("route") == "key"
    assert (await save(sidecar, user)).key.state == USABLE


# -- audit, and secrets -------------------------------------------------------------------------------


async def test_every_change_is_an_audit_line_with_ids_and_without_a_secret(
    sidecar: Sidecar, make: Factory
) -> None:
    user, secret = await make.user(), a_key()
    key = (await save(sidecar, user, secret, label="my label")).key
    await save(sidecar, user, secret, label="my label")
    await update(sidecar, user, key.key_id, is_active=False)
    await ask_again(sidecar, user, key.key_id)
    await keys_of(sidecar, user)
    await sidecar.call("DeleteKey", pb.DeleteKeyRequest(user_id=user, key_id=key.key_id))
    for method, request in (
        ("SaveKey", pb.SaveKeyRequest(user_id=user, provider="openai", secret="sk-x")),
        ("DeleteKey", pb.DeleteKeyRequest(user_id=user, key_id=key.key_id)),
    ):
        await refused(sidecar, method, request)
    lines = [json.loads(line) for line in sidecar.log.getvalue().splitlines() if "operator_change" in line]
    assert [
        (line["action"], line.get("replaced"), line.get("is_active"), line.get("check")) for line in lines
    ] == [
        ("SaveKey", False, None, None),
        ("SaveKey", True, None, None),
        ("UpdateKey", None, False, None),
        ("TestKey", None, None, "VALID"),
        ("DeleteKey", None, None, None),
    ]
    for line in lines:
        assert (line["caller"], line["user_id"], line["key_id"], line["provider"]) == (
            "socket", user, key.key_id, "openai",
        )  # fmt: skip
    assert secret not in sidecar.log.getvalue()


def parts(secret: str) -> list[str]:
    """Pieces of a secret that tell a good deal of it. (Its last four characters may be shown.)"""
    return [secret[start : start + 7] for start in range(8, len(secret) - 7)]


# With a form that we know, and with one that could be anything.
@pytest.mark.parametrize("provider", ["openai", "google", "mistral", "cohere"])
async def test_a_secret_is_nowhere_but_sealed_in_its_row(
    start_sidecar: Callable[..., Any],
    make: Factory,
    sql: Connection,
    providers: Providers,
    provider: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG", "keyturn")
    sidecar = await start_sidecar(provider_timeout=0.5)
    user = await make.user()
    told: list[str] = []
    canaries: list[str] = []
    quoting = play.answer(401, {"error": {"message": "Not {}!"}})

    def quotes(status: int) -> play.Behaviour:
        async def behave(seen: play.Seen, writer: asyncio.StreamWriter) -> None:
            said = f"Not «{seen.key}», {seen.key[:20]} {seen.key[-20:]} {json.dumps(dict(seen.headers))}"
            await play.answer(status, {"error": {"message": said}}, x_key=seen.key)(seen, writer)

        return behave

    behaviours = [
        play.accept, play.refuse, play.fail, play.reset, play.babble, play.redirect, play.hang, play.flood,
        quoting, *(quotes(status) for status in (302, 400, 401, 403, 404, 429, 500)),
    ]  # fmt: skip
    for behaviour in behaviours:
        secret = a_key(provider)
        canaries.append(secret)
        providers.will(behaviour, secret)
        saved = await save(sidecar, user, secret, provider=provider)
        answer = await ask_again(sidecar, user, saved.key.key_id)
        told += [str(saved), str(answer)]
        # What is refused quotes it neither.
        for fields in (
            {"label": "\0"},
            {"provider": "acme"},
            {"user_id": "nobody"},
            {"secret": f"{secret}\n"},
        ):
            request = {"user_id": user, "provider": provider, "secret": secret, **fields}
            refusal = await refused(sidecar, "SaveKey", pb.SaveKeyRequest(**request))  # type: ignore[arg-type]
            told += [refusal.message, str(refusal.details)]
        told += [str(key) for key in await keys_of(sidecar, user)]
        told.append(str(await contents(sql)))
    # A defect of the database on the way, whose error quotes the row.
    await sql.execute("ALTER TABLE user_api_keys ADD CONSTRAINT broken CHECK (priority < 9) NOT VALID")
    broken = pb.SaveKeyRequest(
        user_id=user, provider=provider, secret=canaries[0], label="broken", priority=9
    )
    refusal = await refused(sidecar, "SaveKey", broken)
    assert refusal.info.reason == "INTERNAL"
    told.append(refusal.message)
    assert "internal_error" in sidecar.log.getvalue()
    places = {"answers and tables": "\n".join(told), "log": sidecar.log.getvalue(), "logging": caplog.text}
    for place, text in places.items():
        for secret in canaries:
            assert not [part for part in parts(secret) if part in text], f"in {place}"
    assert canaries[0] in [seen.key for seen in providers.seen], "they were sent indeed"
