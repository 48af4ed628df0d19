"""`keyturn users`: who they are, their tier, and what their own page of API keys shows."""

from __future__ import annotations

import cyclopts

from keyturn.v1 import policy_pb2 as policy
from keyturn.v1 import user_service_pb2 as pb
from keyturn.v1.user_service_pb2_grpc import UserServiceStub
from keyturn_server.cli.calls import DEFAULTS, Options
from keyturn_server.cli.exit_codes import Ended, ExitCode
from keyturn_server.cli.printing import fields, moment, note, show, word, yes_no

app = cyclopts.App(name="users", help="Users and their tiers.")


@app.command
def put(user: str, /, *, tier: str, email: str | None = None, options: Options = DEFAULTS) -> None:
    """Make a user, or set tier and email of the one that is there.

    Parameters
    ----------
    user
        The product's own id of the user.
    tier
        A name in subscription_tiers. One that is not there counts as below all others: stderr says so.
    email
        Where the user can be told of things; '' clears it. Without this option it stays as it is.
    """
    if email is None:
        email = _present_email(user, options)
    request = pb.PutUserRequest(user_id=user, tier=tier, email=email)
    answer = options.call(lambda channel: UserServiceStub(channel).PutUser, request)
    show(answer, _put, as_json=options.json)
    if not answer.user.is_known_tier:
        note(f"subscription_tiers has no tier {tier!r}: the user counts as below all others")


def _present_email(user: str, options: Options) -> str:
    """The email of a user; empty where there is no such user yet. Raises `Ended`."""
    try:
        answer = options.call(
            lambda channel: UserServiceStub(channel).GetUser, pb.GetUserRequest(user_id=user)
        )
    except Ended as ending:
        if ending.code is ExitCode.NOT_FOUND:
            return ""
        raise
    return answer.user.email


@app.command
def get(user: str, /, *, options: Options = DEFAULTS) -> None:
    """Show a user.

    Parameters
    ----------
    user
        The user's id.
    """
    request = pb.GetUserRequest(user_id=user)
    answer = options.call(lambda channel: UserServiceStub(channel).GetUser, request)
    show(answer, lambda answer: _user(answer.user), as_json=options.json)


@app.command
def settings(user: str, /, *, options: Options = DEFAULTS) -> None:
    """Show what the user's own page of API keys shows: who pays now, and what the user has to do.

    Parameters
    ----------
    user
        The user's id.
    """
    request = pb.GetUserSettingsRequest(user_id=user)
    answer = options.call(lambda channel: UserServiceStub(channel).GetUserSettings, request)
    show(answer, _settings, as_json=options.json)


def _put(answer: pb.PutUserResponse) -> str:
    return f"{'Made.' if answer.created else 'Set.'}\n{_user(answer.user)}"


def _user(user: pb.User) -> str:
    return fields(
        ("User", user.user_id),
        ("Tier", user.tier if user.is_known_tier else f"{user.tier} (not known: below all others)"),
        ("Email", user.email),
        ("Made", moment(user.create_time)),
        ("Changed", moment(user.update_time)),
    )


def _settings(answer: pb.GetUserSettingsResponse) -> str:
    action = answer.state == pb.PAYMENT_STATE_ACTION_REQUIRED
    return fields(
        ("State", word(pb.PaymentState, answer.state)),
        ("Reason", word(policy.DenialReason, answer.action_reason) if action else ""),
        ("Message", answer.message),
        ("Mode", word(policy.Mode, answer.mode)),
        ("Page visible", yes_no(answer.page_visible)),
        ("Keys for", ", ".join(answer.providers_with_keys) or "no provider"),
        ("Has credits", yes_no(answer.has_credits)),
    )
