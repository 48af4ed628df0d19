"""UserService: users, and their page of keys. protos/keyturn/v1/user_service.proto says what each method
does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

from keyturn.v1 import policy_pb2, user_service_pb2
from keyturn_server.access import Caller
from keyturn_server.rpc.encode import timestamp
from keyturn_server.rpc.fields import MAX_ID, Fields
from keyturn_server.rpc.guard import CHANGING, READING, Method

if TYPE_CHECKING:
    from keyturn_server.profiles import User
    from keyturn_server.user_settings import SettingsPage, UserSettings

NAME = user_service_pb2.DESCRIPTOR.services_by_name["UserService"].full_name
MAX_EMAIL: Final = 320
MAX_TIER: Final = 64


class Users(Protocol):
    """Where users are kept. `get` raises `UserNotFound`; `put` tells whether the user was made now."""

    async def put(self, *, user_id: str, email: str, tier: str) -> tuple[User, bool]: ...
    async def get(self, user_id: str) -> User: ...


class Changes(Protocol):
    """Who hears of changes that operators make."""

    def changed(self, caller: Caller, action: str, **facts: str | int | bool) -> None: ...


class UserService:
    """Decodes, calls, encodes. `on_change` hears of each user that was put."""

    def __init__(
        self,
        *,
        users: Users,
        page: SettingsPage,
        changes: Changes,
        on_change: Callable[[str], Awaitable[None]],
    ) -> None:
        self._users = users
        self._page = page
        self._changes = changes
        self._on_change = on_change

    @property
    def name(self) -> str:
        """The service's full name."""
        return NAME

    def methods(self) -> dict[str, Method[Any]]:
        """The methods by name."""
        v1 = user_service_pb2
        return {
            "PutUser": Method(request_type=v1.PutUserRequest, answer=self.put_user, roles=CHANGING),
            "GetUser": Method(request_type=v1.GetUserRequest, answer=self.get_user, roles=READING),
            "GetUserSettings": Method(
                request_type=v1.GetUserSettingsRequest, answer=self.get_user_settings, roles=READING
            ),
        }

    async def put_user(
        self, request: user_service_pb2.PutUserRequest, caller: Caller
    ) -> user_service_pb2.PutUserResponse:
        fields = Fields()
        user_id = fields.text("user_id", request.user_id, MAX_ID, required=True)
        email = fields.text("email", request.email, MAX_EMAIL)
        tier = fields.text("tier", request.tier, MAX_TIER, required=True)
        fields.check()
        user, created = await self._users.put(user_id=user_id, email=email, tier=tier)
        # Never the address: logs are read by more people than users are.
        self._changes.changed(caller, "PutUser", user_id=user_id, tier=tier, created=created)
        await self._on_change(user_id)
        return user_service_pb2.PutUserResponse(user=_user(user), created=created)

    async def get_user(
        self, request: user_service_pb2.GetUserRequest, caller: Caller
    ) -> user_service_pb2.GetUserResponse:
        user = await self._users.get(_user_id(request))
        return user_service_pb2.GetUserResponse(user=_user(user))

    async def get_user_settings(
        self, request: user_service_pb2.GetUserSettingsRequest, caller: Caller
    ) -> user_service_pb2.GetUserSettingsResponse:
        return _settings(await self._page.of(_user_id(request)))


def _user_id(request: user_service_pb2.GetUserRequest | user_service_pb2.GetUserSettingsRequest) -> str:
    fields = Fields()
    user_id = fields.text("user_id", request.user_id, MAX_ID, required=True)
    fields.check()
    return user_id


def _user(user: User) -> user_service_pb2.User:
    return user_service_pb2.User(
        user_id=user.id,
        email=user.email,
        tier=user.tier,
        is_known_tier=user.is_known_tier,
        create_time=timestamp(user.created_at),
        update_time=timestamp(user.updated_at),
    )


def _settings(settings: UserSettings) -> user_service_pb2.GetUserSettingsResponse:
    missing = settings.action_reason
    return user_service_pb2.GetUserSettingsResponse(
        page_visible=settings.page_visible,
        mode=policy_pb2.Mode.Value(f"MODE_{settings.mode.name}"),
        state=user_service_pb2.PaymentState.Value(f"PAYMENT_STATE_{settings.state.name}"),
        action_reason=(
            policy_pb2.DENIAL_REASON_UNSPECIFIED
            if missing is None
            else policy_pb2.DenialReason.Value(f"DENIAL_REASON_{missing.name}")
        ),
        message=settings.message,
        providers_with_keys=settings.providers_with_keys,
        has_credits=settings.has_credits,
    )
