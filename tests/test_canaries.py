"""The search for leaks that every test is: it finds what there is to find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from keyturn.v1 import routing_service_pb2 as pb
from tests import canaries
from tests.cli.command import keyturn
from tests.factories import Factory
from tests.support import MASTER_KEY, Sidecar, running_sidecar, temporary_directory
from tests.test_secrets import canary


async def test_a_secret_that_a_sidecar_writes_fails_the_test_that_made_it(
    database: str, make: Factory
) -> None:
    user, secret = await make.user(), canary("sk-proj-")
    await make.key(user, secret=secret)
    for write in (
        lambda sidecar: sidecar.log.write(f'{{"event": "{secret[8:36]}"}}\n'),
        lambda sidecar: canaries._pages[-1].called(secret, "OK"),
        lambda sidecar: (Path(sidecar.address.removeprefix("unix:")).parent / "spool").write_text(secret),
    ):

        async def leak(write: Callable[[Sidecar], Any] = write) -> None:
            async with running_sidecar(database) as sidecar:
                await sidecar.decide(user, key_delivery=pb.KEY_DELIVERY_INLINE)
                write(sidecar)

        with pytest.raises(AssertionError, match="secrets in") as caught:
            await leak()
        assert secret[8:36] not in str(caught.value)


async def test_tokens_are_remembered_as_they_are_answered(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    sidecar = await start_sidecar()
    owner, payer = await make.user(), await make.user(micros=100)
    await make.key(owner)
    handle = (await sidecar.decide(owner, key_delivery=pb.KEY_DELIVERY_REDEEM)).key.handle
    asks = [pb.DecideRequest(user_id=payer, provider="openai", cost_micros=1)]
    batch = await sidecar.call("BatchDecide", pb.BatchDecideRequest(requests=asks))
    ticket = batch.results[0].response.ticket.ticket
    assert canaries.found_in(f"about {handle}") == {"KeyHandle.handle"}
    assert canaries.found_in(f"of {ticket[20:60]}, it is said") == {"CreditTicket.ticket"}
    assert canaries.found_in(MASTER_KEY.upper().lower()) == {"master key"}


async def test_files_of_any_kind_are_looked_through() -> None:
    secret = canary("sk-ant-api03-")
    async with temporary_directory() as directory:
        (directory / "deep").mkdir()
        file = directory / "deep" / "spool.db-wal"
        file.write_bytes(b"SQLite\0\xff\xfe harmless")
        canaries.check_files(directory)
        file.write_bytes(b"SQLite\0\xff\xfe" + secret.encode() + b"\0")
        with pytest.raises(AssertionError, match=r"secrets in .*spool\.db-wal: \['canary'\]"):
            canaries.check_files(directory)


async def test_what_a_command_says_on_stderr_is_looked_through() -> None:
    with pytest.raises(AssertionError, match="secrets in stderr of a command"):
        await keyturn("serve", "--listen", canary(""), "--embedded", "/nonexistent")


def test_words_and_hints_are_no_secrets() -> None:
    canaries.remember("words", "a-sentence-of-words-and-nothing-else")
    canaries.remember("zeros", "0" * 64)
    canaries.remember("short", "sk-1234")
    assert canaries.found_in("a-sentence-of-words-and-nothing-else " + "0" * 64 + " sk-1234") == set()
