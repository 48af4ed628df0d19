"""What a sidecar checks before it serves."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from keyturn_server.app import WrongMasterKey
from keyturn_server.keys.keyring import Keyring
from keyturn_server.settings import SettingsError, read_settings
from tests.factories import KEYRING, Factory
from tests.support import MASTER_KEY

OTHER_KEY = "b7e151628aed2a6abf7158809cf4f3c762e7160f38b4da56a784d9045190cfef"


def keyring_of(key: str) -> Keyring:
    keyring = Keyring.from_settings(key, [])
    assert keyring is not None
    return keyring


async def test_a_wrong_master_key_is_named_at_the_start(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    await make.key(await make.user())
    with pytest.raises(WrongMasterKey) as caught:
        await start_sidecar(encryption_key=OTHER_KEY)
    assert keyring_of(OTHER_KEY).current.id in str(caught.value)
    assert KEYRING.current.id in str(caught.value)
    assert OTHER_KEY not in str(caught.value)


async def test_a_retired_master_key_that_is_missing_is_told_and_stops_nobody(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    missing = keyring_of(OTHER_KEY)
    user = await make.user()
    await make.key(user)
    await make.key(user, keyring=missing)
    sidecar = await start_sidecar()
    lines = [json.loads(line) for line in sidecar.log.getvalue().splitlines()]
    told = [line for line in lines if line["event"] == "master_key_missing"]
    assert [line["master_key_ids"] for line in told] == [[missing.current.id]]
    assert (await sidecar.decide(user)).WhichOneof("route") == "key"


async def test_with_the_new_key_set_and_the_old_one_retired_it_starts(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    user = await make.user()
    await make.key(user)
    sidecar = await start_sidecar(encryption_key=OTHER_KEY, encryption_keys_retired=f" {MASTER_KEY} ")
    assert (await sidecar.decide(user)).WhichOneof("route") == "key"


@pytest.mark.parametrize("text", ["90", "90.0", "PT1M30S", "00:01:30"])
def test_durations_are_seconds_or_iso_8601(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KEYTURN_HOLD_TTL", text)
    assert read_settings().hold_ttl.total_seconds() == 90


@pytest.mark.parametrize("text", ["soon", "-1", "0", "NaN", "inf", "1e400"])
def test_a_duration_that_is_none_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KEYTURN_HOLD_TTL", text)
    with pytest.raises(SettingsError, match="KEYTURN_HOLD_TTL"):
        read_settings()


@pytest.mark.parametrize(
    "text", ["proxy:3128", "socks5://proxy:1080", "http://:", "http://proxy", "http://proxy:x"]
)
def test_a_proxy_that_is_none_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KEYTURN_PROVIDER_PROXY", text)
    with pytest.raises(SettingsError, match="KEYTURN_PROVIDER_PROXY") as caught:
        read_settings()
    assert "hunter2" not in str(caught.value)


def test_a_proxy_with_a_password_is_taken_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYTURN_PROVIDER_PROXY", "http://user:hunter2@proxy:3128")
    settings = read_settings()
    assert settings.provider_proxy is not None
    assert settings.provider_proxy.get_secret_value() == "http://user:hunter2@proxy:3128"
    assert "hunter2" not in repr(settings)


def test_an_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYTURN_LISTEN", "unix:/one, unix:/two")
    assert read_settings().listen == ("unix:/one", "unix:/two")
    assert read_settings(listen=("unix:/three",)).listen == ("unix:/three",)
