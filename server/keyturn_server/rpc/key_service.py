"""KeyService: users' own keys. protos/keyturn/v1/key_service.proto says what each method does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Protocol
from uuid import UUID

from keyturn.secret import Secret
from keyturn.v1 import key_service_pb2
from keyturn_server.access import Caller
from keyturn_server.keys.provider_checks import KeyCheck, is_sendable
from keyturn_server.rpc.encode import KEY_STATES, timestamp
from keyturn_server.rpc.fields import MAX_ID, MAX_PROVIDER, Fields
from keyturn_server.rpc.guard import CHANGING, READING, Method
from keyturn_server.user_keys import KeyChange, NewKey

if TYPE_CHECKING:
    from keyturn_server.configuration import Provider
    from keyturn_server.user_keys import KeyNow, UserKeys

NAME: Final = key_service_pb2.DESCRIPTOR.services_by_name["KeyService"].full_name

MAX_SECRET: Final = 1024
MAX_LABEL: Final = 128
MAX_PRIORITY: Final = 1_000_000

_CHECKS = {check: key_service_pb2.KeyCheck.Value(f"KEY_CHECK_{check.name}") for check in KeyCheck}


class Changes(Protocol):
    """Where it is kept who changed what."""

    def changed(self, caller: Caller, action: str, **facts: str | int | bool) -> None: ...


class KeyService:
    """Decodes, calls, encodes; each change leaves an audit line."""

    def __init__(self, keys: UserKeys, *, changes: Changes) -> None:
        self._keys = keys
        self._changes = changes

    @property
    def name(self) -> str:
        """The service's full name."""
        return NAME

    def methods(self) -> dict[str, Method[Any]]:
        """The methods by name."""
        v1 = key_service_pb2
        return {
            "SaveKey": Method(request_type=v1.SaveKeyRequest, answer=self.save_key, roles=CHANGING),
            "ListKeys": Method(request_type=v1.ListKeysRequest, answer=self.list_keys, roles=READING),
            "UpdateKey": Method(request_type=v1.UpdateKeyRequest, answer=self.update_key, roles=CHANGING),
            "DeleteKey": Method(request_type=v1.DeleteKeyRequest, answer=self.delete_key, roles=CHANGING),
            "TestKey": Method(request_type=v1.TestKeyRequest, answer=self.test_key, roles=CHANGING),
            "ListProviders": Method(
                request_type=v1.ListProvidersRequest, answer=self.list_providers, roles=READING
            ),
        }

    async def save_key(
        self, request: key_service_pb2.SaveKeyRequest, caller: Caller
    ) -> key_service_pb2.SaveKeyResponse:
        new = _new_key_from(request)
        saved, replaced = await self._keys.save(new)
        self._changed(caller, "SaveKey", new.user_id, saved, replaced=replaced)
        return key_service_pb2.SaveKeyResponse(key=_key_message(saved), replaced=replaced)

    async def list_keys(
        self, request: key_service_pb2.ListKeysRequest, caller: Caller
    ) -> key_service_pb2.ListKeysResponse:
        fields = Fields()
        user_id = fields.text("user_id", request.user_id, MAX_ID, required=True)
        provider = fields.text("provider", request.provider, MAX_PROVIDER)
        fields.check()
        keys = await self._keys.keys_of(user_id, provider or None)
        return key_service_pb2.ListKeysResponse(keys=[_key_message(key) for key in keys])

    async def update_key(
        self, request: key_service_pb2.UpdateKeyRequest, caller: Caller
    ) -> key_service_pb2.UpdateKeyResponse:
        user_id, key_id, change = _change_from(request)
        key = await self._keys.change(user_id, key_id, change)
        self._changed(caller, "UpdateKey", user_id, key, is_active=key.key.stored.is_active)
        return key_service_pb2.UpdateKeyResponse(key=_key_message(key))

    async def delete_key(
        self, request: key_service_pb2.DeleteKeyRequest, caller: Caller
    ) -> key_service_pb2.DeleteKeyResponse:
        user_id, key_id = _place_of(request)
        key = await self._keys.delete(user_id, key_id)
        self._changed(caller, "DeleteKey", user_id, key)
        return key_service_pb2.DeleteKeyResponse()

    async def test_key(
        self, request: key_service_pb2.TestKeyRequest, caller: Caller
    ) -> key_service_pb2.TestKeyResponse:
        user_id, key_id = _place_of(request)
        key, checked = await self._keys.test(user_id, key_id)
        self._changed(caller, "TestKey", user_id, key, check=checked.result.value)
        return key_service_pb2.TestKeyResponse(
            key=_key_message(key), check=_CHECKS[checked.result], message=checked.message
        )

    async def list_providers(
        self, request: key_service_pb2.ListProvidersRequest, caller: Caller
    ) -> key_service_pb2.ListProvidersResponse:
        providers = await self._keys.providers()
        return key_service_pb2.ListProvidersResponse(
            providers=[_provider_message(each) for each in providers]
        )

    def _changed(
        self, caller: Caller, action: str, user_id: str, key: KeyNow, **facts: str | int | bool
    ) -> None:
        stored = key.key.stored
        self._changes.changed(
            caller,
            action,
            user_id=user_id,
            key_id=str(stored.id),
            provider=stored.provider,
            key_state=key.state.value,
            **facts,
        )


def _new_key_from(request: key_service_pb2.SaveKeyRequest) -> NewKey:
    """The key in a SaveKeyRequest. Raises `InvalidFields`, which never shows the secret."""
    fields = Fields()
    user_id = fields.text("user_id", request.user_id, MAX_ID, required=True)
    provider = fields.text("provider", request.provider, MAX_PROVIDER, required=True)
    secret = request.secret
    if not secret:
        fields.violations.append(("secret", "Required."))
    elif len(secret) > MAX_SECRET:
        fields.violations.append(("secret", f"At most {MAX_SECRET} characters; this has {len(secret)}."))
    elif not is_sendable(secret):
        fields.violations.append(("secret", "Printable ASCII characters without spaces only."))
    label = fields.text("label", request.label, MAX_LABEL)
    priority = _priority_of(fields, request)
    fields.check()
    return NewKey(user_id=user_id, provider=provider, secret=Secret(secret), label=label, priority=priority)


def _change_from(request: key_service_pb2.UpdateKeyRequest) -> tuple[str, UUID, KeyChange]:
    """Whose key, which, and what to change of it. Raises `InvalidFields`."""
    fields = Fields()
    user_id = fields.text("user_id", request.user_id, MAX_ID, required=True)
    key_id = _key_id_of(fields, request.key_id)
    change = KeyChange(
        is_active=request.is_active if request.HasField("is_active") else None,
        priority=_priority_of(fields, request),
        label=fields.text("label", request.label, MAX_LABEL) if request.HasField("label") else None,
    )
    if change == KeyChange():
        fields.violations.append(("is_active", "At least one of is_active, priority and label is required."))
    fields.check()
    return user_id, key_id, change


def _place_of(request: key_service_pb2.DeleteKeyRequest | key_service_pb2.TestKeyRequest) -> tuple[str, UUID]:
    """Whose key, and which. Raises `InvalidFields`."""
    fields = Fields()
    user_id = fields.text("user_id", request.user_id, MAX_ID, required=True)
    key_id = _key_id_of(fields, request.key_id)
    fields.check()
    return user_id, key_id


def _priority_of(
    fields: Fields, request: key_service_pb2.SaveKeyRequest | key_service_pb2.UpdateKeyRequest
) -> int | None:
    if not request.HasField("priority"):
        return None
    return fields.number("priority", request.priority, MAX_PRIORITY, least=-MAX_PRIORITY)


def _key_id_of(fields: Fields, value: str) -> UUID:
    if not value:
        fields.violations.append(("key_id", "Required."))
        return UUID(int=0)
    try:
        key_id = UUID(value)
    except ValueError:
        key_id = UUID(int=0)
    # Only the usual spelling: Python takes others, too.
    if str(key_id) != value.lower():
        fields.violations.append(("key_id", "Not a UUID, which the ids of keys are."))
    return key_id


def _key_message(now: KeyNow) -> key_service_pb2.Key:
    key, stored = now.key, now.key.stored
    return key_service_pb2.Key(
        key_id=str(stored.id),
        provider=stored.provider,
        label=stored.label,
        priority=stored.priority,
        hint=stored.hint,
        is_active=stored.is_active,
        state=KEY_STATES[now.state],
        last_error=key.last_error,
        cooldown_until_time=timestamp(now.cooldown_until) if now.cooldown_until else None,
        total_requests=key.total_requests,
        total_tokens=key.total_tokens,
        last_use_time=timestamp(key.last_used_at) if key.last_used_at else None,
        verify_time=timestamp(key.verified_at) if key.verified_at else None,
        create_time=timestamp(key.created_at),
        update_time=timestamp(key.updated_at),
    )


def _provider_message(provider: Provider) -> key_service_pb2.Provider:
    return key_service_pb2.Provider(
        provider_id=provider.id,
        name=provider.name,
        is_enabled=provider.is_enabled,
        base_url=provider.base_url,
        auth_header=provider.auth_header,
        auth_prefix=provider.auth_prefix,
        key_pattern=provider.key_pattern,
        is_checkable=provider.check_path is not None,
    )
