"""`keyturn keys`: the provider keys that users bring. No command takes a secret as an argument."""

from __future__ import annotations

import getpass
import sys
from typing import Annotated, Final

import cyclopts
from cyclopts import Parameter

from keyturn.secret import Secret
from keyturn.v1 import key_service_pb2 as pb
from keyturn.v1 import policy_pb2 as policy
from keyturn.v1.key_service_pb2_grpc import KeyServiceStub
from keyturn_server.cli.calls import DEFAULTS, Options
from keyturn_server.cli.exit_codes import Ended, ExitCode, wrong_usage
from keyturn_server.cli.printing import fields, moment, note, on_off, phrase, show, table, yes_no
from keyturn_server.cli.values import Int32

app = cyclopts.App(
    name="keys",
    help="Users' own provider keys. No command prints a secret or takes one as an argument.",
)

_MOST_BYTES: Final = 16 * 1024
_CHECK_ENDS: Final = {
    pb.KEY_CHECK_VALID: ExitCode.DONE,
    pb.KEY_CHECK_INVALID: ExitCode.REFUSED,
    pb.KEY_CHECK_UNREADABLE: ExitCode.REFUSED,
    pb.KEY_CHECK_UNVERIFIED: ExitCode.UNAVAILABLE,
}


@app.command
def save(
    user: str,
    /,
    *,
    provider: str,
    label: str = "",
    priority: Int32 | None = None,
    options: Options = DEFAULTS,
) -> ExitCode:
    """Save a key, after asking its provider about it. The same label again replaces the secret.

    The secret is asked for on a terminal, without echo; otherwise it is the one line on stdin. A key
    that the provider refuses is saved too, marked invalid, also in the place of one that worked: exit
    code 3, and stderr says so.

    Parameters
    ----------
    user
        The user's id.
    provider
        The provider's id: see `keyturn keys providers`.
    label
        The owner's name for it.
    priority
        Lower is tried first. Default: 0, or what the replaced key had.
    """
    request = pb.SaveKeyRequest(user_id=user, provider=provider, label=label, secret=_secret().reveal())
    if priority is not None:
        request.priority = priority
    answer = options.call(lambda channel: KeyServiceStub(channel).SaveKey, request)
    show(answer, _saved, as_json=options.json)
    gone = []
    if answer.replaced:
        gone = ["it replaced the key that had this label; save the old one again to go back"]
    if answer.key.state == policy.KEY_STATE_INVALID:
        note(f"saved, but the provider refuses it: {answer.key.last_error}", *gone)
        return ExitCode.REFUSED
    if answer.key.state == policy.KEY_STATE_UNVERIFIED:
        note("saved, but the provider could not be asked about it: see `keyturn keys test`", *gone)
    return ExitCode.DONE


def _secret() -> Secret:
    """From a prompt or from stdin. Raises `Ended`."""
    try:
        if sys.stdin.isatty():
            text = getpass.getpass("The provider's key (it is not shown): ")
        else:
            text = sys.stdin.buffer.read(_MOST_BYTES + 1).decode()
    except (UnicodeDecodeError, EOFError):
        raise wrong_usage("There is no key in what was given: it is text on one line.") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text or "\n" in text or len(text) > _MOST_BYTES:
        raise wrong_usage("Give the key alone: one line, on stdin or at the prompt.")
    try:
        return Secret(text)
    except ValueError:  # bytes at the prompt that are no text
        raise wrong_usage("There is no key in what was given: it is text on one line.") from None


@app.command(name="list")
def list_keys(user: str, /, *, provider: str = "", options: Options = DEFAULTS) -> None:
    """List a user's keys by provider, in the order in which they are tried.

    Parameters
    ----------
    user
        The user's id.
    provider
        Only the keys for this provider.
    """
    request = pb.ListKeysRequest(user_id=user, provider=provider)
    answer = options.call(lambda channel: KeyServiceStub(channel).ListKeys, request)
    show(answer, _list, as_json=options.json)


@app.command
def update(
    user: str,
    key_id: str,
    /,
    *,
    active: Annotated[bool | None, Parameter(negative="--inactive")] = None,
    priority: Int32 | None = None,
    label: str | None = None,
    options: Options = DEFAULTS,
) -> None:
    """Switch a key on or off, or change its priority or label. What is not given stays.

    Parameters
    ----------
    user
        The user's id.
    key_id
        The key's id.
    active
        Switch it on; --inactive switches it off.
    priority
        Lower is tried first.
    label
        The owner's name for it.
    """
    if active is None and priority is None and label is None:
        raise wrong_usage("Say what to change: --active, --inactive, --priority or --label.")
    request = pb.UpdateKeyRequest(
        user_id=user, key_id=key_id, is_active=active, priority=priority, label=label
    )
    answer = options.call(lambda channel: KeyServiceStub(channel).UpdateKey, request)
    show(answer, lambda answer: _key(answer.key), as_json=options.json)


@app.command
def delete(
    user: str,
    key_id: str,
    /,
    *,
    yes: bool = False,
    options: Options = DEFAULTS,
) -> None:
    """Delete a key for good. What it was used for stays on record.

    Asks on a terminal; anywhere else it takes --yes.

    Parameters
    ----------
    user
        The user's id.
    key_id
        The key's id.
    yes
        Do not ask.
    """
    if not yes:
        _confirm(f"Delete the key {key_id} of {user} for good? [y/N] ")
    request = pb.DeleteKeyRequest(user_id=user, key_id=key_id)
    answer = options.call(lambda channel: KeyServiceStub(channel).DeleteKey, request)
    show(answer, lambda _: f"Deleted {key_id}.", as_json=options.json)


def _confirm(question: str) -> None:
    """Raises `Ended` unless somebody says yes."""
    if not sys.stdin.isatty():
        raise wrong_usage("Nobody can be asked here: give --yes to delete the key.")
    print(question, end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise Ended(ExitCode.REFUSED, "Nothing was deleted.")


@app.command(name="test")
def check(user: str, key_id: str, /, *, options: Options = DEFAULTS) -> ExitCode:
    """Ask the provider about a stored key now, and keep what it says.

    Exit code 0: the provider takes it. 3: it refuses it, or the stored key does not open. 6: the
    provider could not be asked.

    Parameters
    ----------
    user
        The user's id.
    key_id
        The key's id.
    """
    request = pb.TestKeyRequest(user_id=user, key_id=key_id)
    answer = options.call(lambda channel: KeyServiceStub(channel).TestKey, request)
    show(answer, _tested, as_json=options.json)
    return _CHECK_ENDS.get(answer.check, ExitCode.FAULT)


@app.command
def providers(*, options: Options = DEFAULTS) -> None:
    """List the providers, those that are switched off among them."""
    answer = options.call(lambda channel: KeyServiceStub(channel).ListProviders, pb.ListProvidersRequest())
    show(answer, _providers, as_json=options.json)


def _saved(answer: pb.SaveKeyResponse) -> str:
    return f"{'Replaced' if answer.replaced else 'Saved'}.\n{_key(answer.key)}"


def _tested(answer: pb.TestKeyResponse) -> str:
    check = phrase(pb.KeyCheck, answer.check)
    return f"{check.capitalize()}: {answer.message}\n{_key(answer.key)}"


def _key(key: pb.Key) -> str:
    return fields(
        ("Key", key.key_id),
        ("Provider", key.provider),
        ("Label", key.label),
        ("Ends in", key.hint),
        ("State", _state(key)),
        ("Active", yes_no(key.is_active)),
        ("Priority", str(key.priority)),
        ("Last error", key.last_error),
        ("Verified", moment(key.verify_time)),
        ("Last used", moment(key.last_use_time)),
    )


def _state(key: pb.Key) -> str:
    state = phrase(policy.KeyState, key.state)
    until = moment(key.cooldown_until_time)
    return f"{state} until {until}" if key.state == policy.KEY_STATE_COOLING_DOWN and until else state


def _list(answer: pb.ListKeysResponse) -> str:
    return table(
        (
            "key",
            "provider",
            "label",
            "priority",
            "ends in",
            "state",
            "requests",
            "tokens",
            "last used",
            "error",
        ),
        (
            (
                key.key_id,
                key.provider,
                key.label,
                str(key.priority),
                key.hint,
                _state(key),
                f"{key.total_requests:,}",
                f"{key.total_tokens:,}",
                moment(key.last_use_time),
                key.last_error,
            )
            for key in answer.keys
        ),
        numbers={"priority", "requests", "tokens"},
        prose={"label", "state", "last used", "error"},
        empty="No keys.",
    )


def _providers(answer: pb.ListProvidersResponse) -> str:
    return table(
        ("provider", "name", "switched", "checkable", "header", "base url"),
        (
            (
                provider.provider_id,
                provider.name,
                on_off(provider.is_enabled),
                yes_no(provider.is_checkable),
                provider.auth_header,
                provider.base_url,
            )
            for provider in answer.providers
        ),
        prose={"name"},
        empty="No providers.",
    )


# It goes to the database itself, and its module brings the server's: read when it is called for.
app.command("keyturn_server.cli.rotation:rotate", name="rotate")
