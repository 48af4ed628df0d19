"""Who may call what: every method, every role, every way to be known; and what strangers get to know."""

from __future__ import annotations

import asyncio
import importlib
import json
import pkgutil
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

import keyturn.v1
from keyturn.v1 import routing_service_pb2 as pb
from keyturn_server.access import ALL_ROLES, Role
from keyturn_server.access_file import Callers, digest_of, parse_callers
from keyturn_server.rpc.access import ACTOR
from keyturn_server.watched import File
from tests.certificates import Authority, Identity
from tests.cli.command import free_port
from tests.factories import Factory
from tests.support import Sidecar, eventually, temporary_directory

GATEWAY, OPERATOR, VIEWER = {Role.GATEWAY}, {Role.OPERATOR}, {Role.VIEWER}
READ = OPERATOR | VIEWER
ALL = set(Role)

# DESIGN, "Wire contract" and "Access". Secrets are in the answers of three methods: for gateways alone.
ROLES: Mapping[str, set[Role]] = {
    "RoutingService/Decide": GATEWAY,
    "RoutingService/Record": GATEWAY,
    "RoutingService/Redeem": GATEWAY,
    "RoutingService/BatchDecide": GATEWAY,
    "RoutingService/BatchRecord": GATEWAY,
    "RoutingService/Explain": ALL,
    "KeyService/SaveKey": OPERATOR,
    "KeyService/ListKeys": READ,
    "KeyService/UpdateKey": OPERATOR,
    "KeyService/DeleteKey": OPERATOR,
    "KeyService/TestKey": OPERATOR,
    "KeyService/ListProviders": READ,
    "FlagService/ListFlags": READ,
    "FlagService/SetFlags": OPERATOR,
    "FlagService/SetMode": OPERATOR,
    "FlagService/SimulateFlags": READ,
    "FlagService/ListFlagChanges": READ,
    "FlagService/RefreshFlags": OPERATOR,
    "CreditService/GrantCredits": OPERATOR,
    "CreditService/GetBalance": READ,
    "CreditService/ListTransactions": READ,
    "UserService/PutUser": OPERATOR,
    "UserService/GetUser": READ,
    "UserService/GetUserSettings": READ,
    "ReportService/GetUsageSplit": READ,
    "ReportService/ListUsersWithoutKeys": READ,
    "ReportService/GetAdoption": READ,
}
SECRET_FIELDS = {"RoutingService/Decide", "RoutingService/Redeem", "RoutingService/BatchDecide"}
FOREIGN = (
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/List",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.channelz.v1.Channelz/GetServers",
)
UNKNOWN = ("/keyturn.v1.RoutingService/Nothing", "/no.such.Service/Method", "/grpc.health.v1.Health/X")

AUTHORITY = Authority()
SERVER = AUTHORITY.server()
# Not one that any method takes, but only who may call it gets to hear that.
MALFORMED = b"\xff"


def methods() -> dict[str, Any]:
    """Every method of every service of the contract, as its descriptor."""
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(keyturn.v1.__path__):
        if module.name.endswith("_service_pb2"):
            file = importlib.import_module(f"keyturn.v1.{module.name}").DESCRIPTOR
            for service in file.services_by_name.values():
                found |= {f"{service.name}/{method.name}": method for method in service.methods}
    return found


def token_of(role: str) -> str:
    return f"kta_the-token-of-{role}"


def spiffe_id(role: str) -> str:
    return f"spiffe://example.com/{role}"


def entry(
    name: str, roles: Iterable[str], *, tokens: Iterable[str] = (), certificates: Iterable[str] = ()
) -> str:
    """An entry of an access file."""
    return (
        f"[[callers]]\nname = {json.dumps(name)}\nroles = {json.dumps(list(roles))}\n"
        f"token_sha256 = {json.dumps([digest_of(token).hex() for token in tokens])}\n"
        f"certificates = {json.dumps(list(certificates))}\n"
    )


EACH_ROLE = "".join(
    entry(role, [role], tokens=[token_of(role)], certificates=[spiffe_id(role), f"{role}.example.com"])
    for role in Role
)


def write(path: Path, text: str | bytes) -> Path:
    """Puts a file there in one go, as tools do."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(text if isinstance(text, bytes) else text.encode())
    fresh.chmod(0o600)
    fresh.rename(path)
    return path


@asynccontextmanager
async def files() -> AsyncIterator[Path]:
    """A directory with an access file, a certificate, its key, and the authority of callers."""
    async with temporary_directory() as directory:
        write(directory / "access.toml", EACH_ROLE)
        write(directory / "cert.pem", SERVER.certificate)
        write(directory / "key.pem", SERVER.key)
        write(directory / "ca.pem", AUTHORITY.certificate)
        yield directory


def mutual_tls(directory: Path) -> dict[str, Any]:
    """Settings: TLS in which callers have a certificate."""
    return {
        "also": ["127.0.0.1:0"],
        "access_file": directory / "access.toml",
        "tls_cert": directory / "cert.pem",
        "tls_key": directory / "key.pem",
        "tls_client_ca": directory / "ca.pem",
    }


def secure_channel(address: str, identity: Identity | None = None, **options: Any) -> grpc.aio.Channel:
    """A TLS connection of its own."""
    roots = options.get("roots", AUTHORITY.certificate)
    key, certificate = (identity.key, identity.certificate) if identity else (None, None)
    return grpc.aio.secure_channel(
        address,
        grpc.ssl_channel_credentials(roots, key, certificate),
        options=[("grpc.use_local_subchannel_pool", 1)],
    )


def plain_channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


class Outcome(NamedTuple):
    """All that a caller gets to see of how a call ended."""

    code: grpc.StatusCode
    message: str | None
    initial: tuple[tuple[str, Any], ...]
    trailing: tuple[tuple[str, Any], ...]

    @property
    def reason(self) -> str:
        details = dict(self.trailing).get("grpc-status-details-bin")
        if details is None:
            return ""
        info: Any = status_pb2.Status.FromString(details).details[0]
        return str(info.value[2 : 2 + info.value[1]].decode())


async def ending(
    channel: grpc.aio.Channel, path: str, body: bytes = MALFORMED, metadata: Any = ()
) -> Outcome:
    """How a call ends.

    A unary one: gRPC's streams tell of an own error when the other side has ended before they sent.
    """
    method: Any = channel.unary_unary(path)
    call = method(body, metadata=metadata, timeout=30)
    code, initial, trailing = await call.code(), await call.initial_metadata(), await call.trailing_metadata()
    return Outcome(code, await call.details(), tuple(initial or ()), tuple(trailing or ()))


async def answers(channel: grpc.aio.Channel, path: str) -> bool:
    """Whether there is a first answer to an empty request."""
    method: Any = channel.stream_stream(path)
    call = method(iter([b""]), timeout=30)
    answered = await call.read() is not grpc.aio.EOF
    call.cancel()
    return answered


async def served(sidecar: Sidecar) -> list[str]:
    """The methods of the contract that the sidecar has."""
    health: Any = health_pb2_grpc.HealthStub(sidecar.channel)
    listed = (await health.List(health_pb2.HealthListRequest(), timeout=30)).statuses
    return [name for name in methods() if f"keyturn.v1.{name.partition('/')[0]}" in listed]


# -- methods and roles --------------------------------------------------------------------------------


def test_the_table_has_every_method_of_the_contract_and_no_other() -> None:
    assert set(ROLES) == set(methods())


def test_secrets_leave_to_gateways_alone() -> None:
    def with_secret(message: Any) -> bool:
        return any(
            field.name == "secret" or (field.message_type is not None and with_secret(field.message_type))
            for field in message.fields
            if not (field.message_type and field.message_type.full_name.startswith("google."))
        )

    answering = {name for name, method in methods().items() if with_secret(method.output_type)}
    # Explain answers with a DecideResponse, whose secret it never fills: tests/test_secrets.py.
    assert answering == SECRET_FIELDS | {"RoutingService/Explain"}
    for name in SECRET_FIELDS:
        assert ROLES[name] == GATEWAY


@pytest.mark.parametrize("role", Role)
async def test_every_method_is_for_its_roles_by_socket_token_and_certificate(
    start_sidecar: Callable[..., Any], role: Role
) -> None:
    async with files() as directory:
        sidecar = await start_sidecar(**mutual_tls(directory), socket_roles={role})
        names = await served(sidecar)
        assert "RoutingService/Decide" in names
        by_spiffe_id = AUTHORITY.caller(spiffe_id(role))
        by_dns_name = AUTHORITY.caller(f"{role}.example.com", "another.example.com")
        async with (
            secure_channel(sidecar.addresses[1], by_spiffe_id) as spiffe,
            secure_channel(sidecar.addresses[1], by_dns_name) as dns,
        ):
            ways: dict[str, Callable[[str], Any]] = {
                "socket": lambda path: ending(sidecar.channel, path),
                "spiffe id": lambda path: ending(spiffe, path),
                "dns name": lambda path: ending(dns, path),
            }
            for other in Role:
                ways[f"token of {other}"] = lambda path, other=other: ending(  # type: ignore[misc]
                    sidecar.channel, path, metadata=bearer(token_of(other))
                )
            for name in names:
                for way, call in ways.items():
                    holds = Role(way.rpartition(" ")[2]) if way.startswith("token") else role
                    outcome = await call(f"/keyturn.v1.{name}")
                    expected = (
                        (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
                        if holds in ROLES[name]
                        else (grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED")
                    )
                    assert (outcome.code, outcome.reason) == expected, f"{name} as {holds} by {way}"


@pytest.mark.parametrize("role", Role)
async def test_health_reflection_and_channelz_are_for_every_role(
    start_sidecar: Callable[..., Any], role: Role
) -> None:
    async with files() as directory:
        sidecar = await start_sidecar(**mutual_tls(directory), socket_roles={role}, reflection=True)
        identity = AUTHORITY.caller(spiffe_id(role))
        async with secure_channel(sidecar.addresses[1], identity) as channel:
            for path in FOREIGN:
                for way in (channel, sidecar.channel):
                    assert await answers(way, path), path


async def test_whoever_is_known_hears_that_there_is_no_such_method(sidecar: Sidecar) -> None:
    for path in (*UNKNOWN, *FOREIGN[3:]):
        assert (await ending(sidecar.channel, path)).code is grpc.StatusCode.UNIMPLEMENTED


async def test_a_malformed_question_about_health_is_answered_as_one(sidecar: Sidecar) -> None:
    for path in FOREIGN[:3]:
        outcome = await ending(sidecar.channel, path)
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")


async def test_a_method_without_its_request_is_not_carried_out(sidecar: Sidecar) -> None:
    for name in await served(sidecar):
        method: Any = sidecar.channel.stream_stream(f"/keyturn.v1.{name}")
        call = method(iter(()), timeout=30)
        assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT, name


# -- strangers ----------------------------------------------------------------------------------------

WRONG_AUTHORIZATION: dict[str, tuple[tuple[str, str], ...]] = {
    "unknown": bearer("kta_nobody-has-this-one"),
    "a hash": bearer(digest_of(token_of("gateway")).hex()),
    "cut": bearer(token_of("gateway")[:-1]),
    "longer": bearer(token_of("gateway") + "x"),
    "empty": bearer(""),
    "nothing": (("authorization", ""),),
    "no scheme": (("authorization", token_of("gateway")),),
    "another scheme": (("authorization", f"Basic {token_of('gateway')}"),),
    "two spaces": (("authorization", f"Bearer  {token_of('gateway')}"),),
    "twice": bearer(token_of("gateway")) * 2,
    "two": bearer(token_of("gateway")) + bearer(token_of("viewer")),
    "a wrong one first": bearer("kta_wrong") + bearer(token_of("gateway")),
}


async def everything(channel: grpc.aio.Channel, metadata: Any = ()) -> set[Outcome]:
    """How all that one can ask for ends."""
    return {
        await ending(channel, path, body, metadata)
        for path in (*(f"/keyturn.v1.{name}" for name in ROLES), *FOREIGN, *UNKNOWN)
        for body in ((b"", MALFORMED) if "Decide" not in path else (b"", MALFORMED, b"\n" * 70_000))
    } | {
        # Over what gRPC itself takes.
        await ending(channel, path, bytes(2_000_000), metadata)
        for path in ("/keyturn.v1.RoutingService/Decide", FOREIGN[0], UNKNOWN[0])
    }


@pytest.mark.parametrize("reflection", [True, False])
async def test_a_stranger_gets_one_answer_whatever_is_asked(
    start_sidecar: Callable[..., Any], reflection: bool
) -> None:
    """No credential, wrong tokens on every transport, wrong certificates: the same to the byte."""
    seen: set[Outcome] = set()
    async with files() as directory:
        mutual = await start_sidecar(**mutual_tls(directory), reflection=reflection)
        plain = await start_sidecar(
            also=["127.0.0.1:0"], access_file=directory / "access.toml", reflection=reflection
        )
        wrong = [
            AUTHORITY.caller("spiffe://example.com/nobody", "nobody.example.com"),
            AUTHORITY.caller(spiffe_id("gateway") + "/x", "gateway.example.com.evil.example"),
            AUTHORITY.caller(spiffe_id("gateway"), spiffe_id("viewer")),
            AUTHORITY.caller("gateway.example.com", "viewer.example.com"),
            AUTHORITY.caller("*.example.com"),
            AUTHORITY.caller(common_name="gateway.example.com", email="gateway@gateway.example.com"),
        ]
        for identity in wrong:
            async with secure_channel(mutual.addresses[1], identity) as channel:
                seen |= await everything(channel)
        # A good certificate and a good socket do not make up for a wrong token.
        good = AUTHORITY.caller(spiffe_id("gateway"))
        async with (
            secure_channel(mutual.addresses[1], good) as channel,
            plain_channel(plain.addresses[1]) as tcp,
        ):
            seen |= await everything(tcp)
            for each in (channel, tcp, plain.channel):
                seen |= await everything(each, WRONG_AUTHORIZATION["unknown"])
            for metadata in WRONG_AUTHORIZATION.values():
                for each in (channel, tcp, plain.channel):
                    seen.add(await ending(each, "/keyturn.v1.RoutingService/Decide", b"", metadata))
            # It may claim what it likes.
            seen.add(await ending(tcp, "/keyturn.v1.RoutingService/Decide", b"", ((ACTOR, "ann"),)))
    assert len(seen) == 1, seen
    (only,) = seen
    assert only.code is grpc.StatusCode.UNAUTHENTICATED
    assert only.reason == "UNAUTHENTICATED"
    assert only.message == "This caller is not known here."
    assert [key for key, _ in only.trailing] == ["grpc-status-details-bin"]


async def test_without_a_certificate_of_the_authority_there_is_no_connection(
    start_sidecar: Callable[..., Any],
) -> None:
    other = Authority()
    async with files() as directory:
        sidecar = await start_sidecar(**mutual_tls(directory))
        for identity in (None, other.caller(spiffe_id("gateway"))):
            async with secure_channel(sidecar.addresses[1], identity) as channel:
                for metadata in ((), bearer(token_of("gateway"))):
                    outcome = await ending(channel, FOREIGN[0], b"", metadata)
                    assert outcome.code is grpc.StatusCode.UNAVAILABLE
        async with plain_channel(sidecar.addresses[1]) as channel:
            assert (await ending(channel, FOREIGN[0], b"")).code is grpc.StatusCode.UNAVAILABLE


async def test_tls_without_client_authorities_is_for_tokens(start_sidecar: Callable[..., Any]) -> None:
    async with files() as directory:
        sidecar = await start_sidecar(**{**mutual_tls(directory), "tls_client_ca": None})
        async with secure_channel(sidecar.addresses[1], AUTHORITY.caller(spiffe_id("viewer"))) as channel:
            assert (await ending(channel, FOREIGN[0], b"")).code is grpc.StatusCode.UNAUTHENTICATED
            known = await ending(channel, FOREIGN[0], b"", bearer(token_of("viewer")))
            assert known.code is grpc.StatusCode.OK


async def test_insecure_loopback_has_every_role_and_a_token_there_has_its_own(
    start_sidecar: Callable[..., Any],
) -> None:
    async with files() as directory:
        sidecar = await start_sidecar(
            also=["127.0.0.1:0"], access_file=directory / "access.toml", insecure_loopback=True
        )
        async with plain_channel(sidecar.addresses[1]) as channel:
            for name in await served(sidecar):
                path = f"/keyturn.v1.{name}"
                assert (await ending(channel, path)).reason == "MALFORMED_REQUEST"
                outcome = await ending(channel, path, metadata=bearer(token_of("viewer")))
                allowed = Role.VIEWER in ROLES[name]
                assert outcome.reason == ("MALFORMED_REQUEST" if allowed else "PERMISSION_DENIED")


async def test_a_denial_is_counted_and_told_without_the_token(start_sidecar: Callable[..., Any]) -> None:
    async with files() as directory:
        metrics = f"127.0.0.1:{free_port()}"
        sidecar = await start_sidecar(access_file=directory / "access.toml", metrics=metrics)
        for _ in range(50):
            await ending(sidecar.channel, UNKNOWN[1], b"", bearer("kta_a-wrong-token-0123456789"))
        await ending(sidecar.channel, "/keyturn.v1.RoutingService/Decide", b"", bearer(token_of("viewer")))
        told = [event for event in events(sidecar) if event["event"] == "access_denied"]
        assert len(told) < 50
        assert {(event["code"], event["method"], event["caller"]) for event in told} == {
            ("UNAUTHENTICATED", "unknown", "socket"),
            ("PERMISSION_DENIED", "Decide", "token:viewer"),
        }
        page = await asyncio.to_thread(read, f"http://{metrics}/metrics")
        assert 'keyturn_access_denied_total{code="UNAUTHENTICATED"} 50.0' in page
        assert 'keyturn_access_denied_total{code="PERMISSION_DENIED"} 1.0' in page
        assert 'keyturn_file_in_force{file="access"} 1.0' in page
        assert "no.such" not in page
        for text in ("kta_", "no.such", digest_of(token_of("viewer")).hex()):
            assert text not in sidecar.log.getvalue()


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as response:  # noqa: S310 - ours
        return str(response.read().decode())


# -- names --------------------------------------------------------------------------------------------


async def named(sidecar: Sidecar, channel: grpc.aio.Channel, user: str, metadata: Any = ()) -> str:
    """Under what name a caller stands in the log."""
    before = len(handed_out(sidecar))
    request = pb.DecideRequest(user_id=user, provider="openai", key_delivery=pb.KEY_DELIVERY_INLINE)
    outcome = await ending(
        channel, "/keyturn.v1.RoutingService/Decide", request.SerializeToString(), metadata
    )
    assert outcome.code is grpc.StatusCode.OK, outcome

    async def told() -> list[dict[str, Any]]:
        return handed_out(sidecar)[before:]

    (line,) = await eventually(told)
    return str(line["caller"])


def events(sidecar: Sidecar) -> list[dict[str, Any]]:
    return [json.loads(line) for line in sidecar.log.getvalue().splitlines()]


def handed_out(sidecar: Sidecar) -> list[dict[str, Any]]:
    return [event for event in events(sidecar) if event["event"] == "secret_handed_out"]


async def test_callers_stand_in_the_log_by_how_they_are_known(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    user = await make.user()
    await make.key(user)
    async with files() as directory:
        sidecar = await start_sidecar(**mutual_tls(directory))
        loopback = await start_sidecar(also=["127.0.0.1:0"], insecure_loopback=True)
        claim = ((ACTOR, "ann"),)
        async with (
            secure_channel(sidecar.addresses[1], AUTHORITY.caller(spiffe_id("gateway"))) as tls,
            plain_channel(loopback.addresses[1]) as tcp,
        ):
            token = bearer(token_of("gateway"))
            assert await named(sidecar, sidecar.channel, user) == "socket"
            assert await named(sidecar, sidecar.channel, user, claim) == "socket:ann"
            assert await named(sidecar, sidecar.channel, user, token) == "token:gateway"
            assert await named(sidecar, sidecar.channel, user, token + claim) == "token:gateway"
            assert await named(sidecar, tls, user) == "cert:gateway"
            assert await named(sidecar, tls, user, claim) == "cert:gateway"
            assert await named(loopback, tcp, user) == "loopback"
            assert await named(loopback, tcp, user, claim) == "loopback:ann"
            secret = ((ACTOR, "kta_0123456789abcdef"),)
            assert await named(loopback, tcp, user, secret) == "loopback:***"


@pytest.mark.parametrize("actor", ["", "x" * 65, " ann", "ann "])
async def test_an_actor_that_is_no_name_is_refused(sidecar: Sidecar, actor: str) -> None:
    await refuses(sidecar, ((ACTOR, actor),))


async def test_two_actors_are_refused(sidecar: Sidecar) -> None:
    await refuses(sidecar, ((ACTOR, "ann"), (ACTOR, "bob")))


async def refuses(sidecar: Sidecar, metadata: Any) -> None:
    outcome = await ending(sidecar.channel, "/keyturn.v1.RoutingService/Decide", b"", metadata)
    assert outcome.code is grpc.StatusCode.INVALID_ARGUMENT
    assert ACTOR in (outcome.message or "")


async def test_as_many_actors_as_one_likes_may_call(sidecar: Sidecar) -> None:
    for number in range(1_100):
        outcome = await ending(sidecar.channel, FOREIGN[0], b"", ((ACTOR, f"actor {number}"),))
        assert outcome.code is grpc.StatusCode.OK


# -- a changed file -----------------------------------------------------------------------------------


async def code_as(channel: grpc.aio.Channel, token: str) -> grpc.StatusCode:
    return (await ending(channel, FOREIGN[0], b"", bearer(token))).code


def becomes(channel: grpc.aio.Channel, token: str, code: grpc.StatusCode) -> Any:
    """Until callers with that token are answered so."""

    async def is_so() -> bool:
        return await code_as(channel, token) is code

    return eventually(is_so)


def told(sidecar: Sidecar, event: str) -> Any:
    async def is_told() -> list[dict[str, Any]]:
        return [each for each in events(sidecar) if each["event"] == event]

    return eventually(is_told)


async def test_the_access_file_is_read_again_without_a_failed_call(
    start_sidecar: Callable[..., Any], make: Factory
) -> None:
    user = await make.user()
    await make.key(user)
    request = pb.DecideRequest(user_id=user, provider="openai").SerializeToString()
    stays = entry("stays", ["gateway"], tokens=["kta_stays"])
    goes = entry("goes", ["gateway"], tokens=["kta_goes"])
    comes = entry("comes", ["gateway"], tokens=["kta_comes"])
    ok, stranger = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED
    codes: list[grpc.StatusCode] = []
    over = asyncio.Event()
    async with files() as directory:
        path = directory / "access.toml"
        write(path, stays + goes)
        sidecar = await start_sidecar(also=["127.0.0.1:0"], access_file=path)
        channel = sidecar.channel

        async def calls_on() -> None:
            async with plain_channel(sidecar.addresses[1]) as own:
                while not over.is_set():
                    decide = "/keyturn.v1.RoutingService/Decide"
                    codes.append((await ending(own, decide, request, bearer("kta_stays"))).code)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(calls_on())
            assert await code_as(channel, "kta_goes") is ok
            assert await code_as(channel, "kta_comes") is stranger
            write(path, stays + comes)
            await becomes(channel, "kta_comes", ok)
            assert await code_as(channel, "kta_goes") is stranger

            # Broken, open to others, gone: the last good one stays, and the log says why.
            spoiled: tuple[tuple[Callable[[], object], str], ...] = (
                (lambda: write(path, stays + goes.replace("gateway", "king")), "callers[2] (goes).roles"),
                (lambda: write(path, stays + "[[call"), "is not TOML"),
                (lambda: write(path, ""), "at least one [[callers]]"),
                (lambda: write(path, stays + f"x = {'7' * 5000}"), "too long or too deep"),
                (lambda: write(path, stays + "x = " + "[" * 50_000), "too long or too deep"),
                (lambda: path.chmod(0o666), "others can write it"),
                (lambda: path.unlink(), "cannot be read"),
            )
            for number, (spoil, reason) in enumerate(spoiled, 1):
                spoil()

                async def is_told(number: int = number, reason: str = reason) -> bool:
                    told = [each["reason"] for each in events(sidecar) if each["event"] == "reload_failed"]
                    return len(told) == number and reason in told[-1]

                await eventually(is_told)
                assert await code_as(channel, "kta_comes") is ok
                assert await code_as(channel, "kta_goes") is stranger

            # As Kubernetes does it: a link is turned to a directory with the new file.
            for version, text in (("v1", stays + comes), ("v2", stays + goes)):
                (directory / version).mkdir()
                write(directory / version / "access.toml", text)
            (directory / "data").symlink_to("v1")
            path.symlink_to("data/access.toml")
            await told(sidecar, "access_reloaded")
            (directory / "turned").symlink_to("v2")
            (directory / "turned").rename(directory / "data")
            await becomes(channel, "kta_goes", ok)
            assert await code_as(channel, "kta_comes") is stranger
            over.set()
    assert len(codes) > 10
    assert set(codes) == {ok}
    failed = [each for each in events(sidecar) if each["event"] == "reload_failed"]
    assert len(failed) == 7, "each cause is told once"
    assert "kta_" not in sidecar.log.getvalue()


async def test_a_reload_that_fails_unforeseen_leaves_the_last_good_file_in_force(
    start_sidecar: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(file: File) -> Callers:
        if b"unforeseen" in file.contents:
            raise LookupError("kta_quoted")
        return parse_callers(file)

    monkeypatch.setattr("keyturn_server.app.parse_callers", parse)
    async with files() as directory:
        path = write(directory / "access.toml", entry("web", ALL_ROLES, tokens=["kta_web"]))
        sidecar = await start_sidecar(access_file=path)
        write(path, "unforeseen")
        (failed,) = await told(sidecar, "reload_failed")
        assert failed["reason"] == "LookupError, which is unexpected"
        assert "kta_quoted" not in sidecar.log.getvalue()
        assert await code_as(sidecar.channel, "kta_web") is grpc.StatusCode.OK
        write(path, entry("web", ALL_ROLES, tokens=["kta_next"]))
        await becomes(sidecar.channel, "kta_next", grpc.StatusCode.OK)


async def test_a_caller_keeps_its_place_in_the_table_by_all_its_tokens(
    start_sidecar: Callable[..., Any],
) -> None:
    async with files() as directory:
        write(directory / "access.toml", entry("web", ALL_ROLES, tokens=["kta_old", "kta_new"]))
        sidecar = await start_sidecar(access_file=directory / "access.toml")
        for token in ("kta_old", "kta_new"):
            assert await code_as(sidecar.channel, token) is grpc.StatusCode.OK
