"""What can go wrong, by meaning. rpc/status.py turns each into one gRPC status.

    KeyturnFault
    ├── InvalidFields         the request: which fields, and what their limits are
    ├── UserNotFound
    ├── RequestIdReused       one request_id, two providers
    ├── HoldNotFound          a genuine ticket whose hold is not in this database
    ├── RecordConflict        recorded before with other contents
    ├── RecordTooLate         more than 7 days after expiry
    ├── HandleExpired
    ├── HandleRedeemed
    ├── KeyGone               the key behind a handle cannot be used any more
    ├── Unauthenticated       nobody we know calls
    ├── PermissionDenied      somebody calls whose roles do not cover the method
    ├── EncryptionNotConfigured
    ├── ByokDisabled
    ├── TierNotEligible
    ├── ProviderDisabled
    ├── TooManyKeys
    ├── KeyNotFound
    ├── LabelTaken            two keys of one user for one provider under one label
    ├── GrantConflict         one request_id, two amounts
    ├── LockoutNotAcknowledged
    ├── Overloaded            there is more to do than can be done in time
    └── StoreUnavailable      PostgreSQL cannot be reached, or did not answer in time
        ├── RowLocked         somebody else keeps a row locked that the request needs
        └── SpoolUnavailable  and a record cannot be made durable on our own disk either

A garbled or foreign token is `keys.tokens.InvalidToken`. Messages are safe to show to the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum


class KeyturnFault(Exception):  # noqa: N818 - faults are named for what they mean
    """The root: a fault with a meaning, as opposed to a defect of the program."""


class InvalidFields(KeyturnFault):
    """Fields of a request that break their limits, each with a sentence that names the limit."""

    def __init__(self, *violations: tuple[str, str]) -> None:
        self.violations: Sequence[tuple[str, str]] = violations
        sentences = (f"{field}: {description.removesuffix('.')}" for field, description in violations)
        super().__init__("; ".join(sentences) + ".")


class UserNotFound(KeyturnFault):
    """Nobody by that id."""

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        super().__init__("There is no such user.")


class RequestIdReused(KeyturnFault):
    """The request id has a ticket for another provider."""

    def __init__(self, provider: str) -> None:
        super().__init__(
            f"This request_id already has a ticket for the provider {provider!r}: "
            "use another request_id for another provider."
        )


class HoldNotFound(KeyturnFault):
    """The ticket is genuine, but its hold is not in this database."""

    def __init__(self) -> None:
        super().__init__("The hold of this ticket is not known here.")


class RecordConflict(KeyturnFault):
    """This decision was recorded before, with other contents."""

    def __init__(self) -> None:
        super().__init__("This decision has been recorded before with other contents.")


class RecordTooLate(KeyturnFault):
    """The handle or ticket expired too long ago to be recorded."""

    def __init__(self) -> None:
        super().__init__("A record is taken up to 7 days after the handle or ticket expired.")


class HandleExpired(KeyturnFault):
    """The handle's time to be redeemed is over."""

    def __init__(self) -> None:
        super().__init__("The handle has expired: decide again.")


class HandleRedeemed(KeyturnFault):
    """The handle has given up its secret before."""

    def __init__(self) -> None:
        super().__init__("The handle has been redeemed before: decide again.")


class KeyGone(KeyturnFault):
    """The key behind a handle was deleted, replaced, refused, switched off, or does not open."""

    def __init__(self) -> None:
        super().__init__("The key behind this handle cannot be used any more: decide again.")


class Unauthenticated(KeyturnFault):
    """Nobody we know calls. Says no more than that: not what was missing, nor what would do."""

    def __init__(self) -> None:
        super().__init__("This caller is not known here.")


class PermissionDenied(KeyturnFault):
    """The caller is known, and none of its roles covers the method."""

    def __init__(self, roles: Iterable[str]) -> None:
        self.roles = sorted(roles)
        super().__init__(f"This method is for the role {' or '.join(self.roles)}.")


class EncryptionNotConfigured(KeyturnFault):
    """There is no ENCRYPTION_KEY, so that no key can be sealed or opened."""

    def __init__(self) -> None:
        super().__init__("This sidecar has no ENCRYPTION_KEY: keys can be neither saved nor opened.")


class ByokDisabled(KeyturnFault):
    """Own keys are switched off for everyone."""

    def __init__(self) -> None:
        super().__init__("Own keys are switched off (byok_enabled is false).")


class TierNotEligible(KeyturnFault):
    """The user's tier may not bring keys."""

    def __init__(self, tier: str, min_tier: str) -> None:
        super().__init__(f"Own keys are for the tier {min_tier!r} and above; this user's is {tier!r}.")


class ProviderDisabled(KeyturnFault):
    """The provider is switched off."""

    def __init__(self, provider: str) -> None:
        super().__init__(f"The provider {provider!r} is switched off.")


class TooManyKeys(KeyturnFault):
    """The user has as many keys as a user may have, for the provider or in all."""

    def __init__(self, limit: int, provider: str | None = None) -> None:
        where = f" for the provider {provider!r}" if provider else ""
        super().__init__(f"A user has at most {limit} keys{where}: delete one first.")


class KeyNotFound(KeyturnFault):
    """The user has no key by that id."""

    def __init__(self, key_id: str) -> None:
        self.key_id = key_id
        super().__init__("The user has no such key.")


class LabelTaken(KeyturnFault):
    """Another key of the user for the provider has the label."""

    def __init__(self) -> None:
        super().__init__("The user has another key with this label for the provider.")


class GrantConflict(KeyturnFault):
    """The request id was granted before, with another amount. In micro-USD."""

    def __init__(self, amount_micros: int) -> None:
        super().__init__(
            f"This request_id was granted before, with {amount_micros} micros: use another for another grant."
        )


class LockoutNotAcknowledged(KeyturnFault):
    """The change would lock out eligible users without a usable key; nothing was changed."""

    def __init__(self, locked_out_users: int) -> None:
        self.locked_out_users = locked_out_users
        super().__init__(
            f"BYOK_ONLY would deny every request of {locked_out_users} eligible users without a usable key: "
            "set acknowledge_lockout to go ahead."
        )


class StoreUnavailable(KeyturnFault):
    """PostgreSQL cannot be reached or did not answer in time; what was asked may have been done."""

    def __init__(self) -> None:
        super().__init__("The database cannot be reached.")


class RowLocked(StoreUnavailable):
    """Somebody else, such as an operator's open transaction, keeps a row locked; nothing was done."""

    def __init__(self) -> None:
        KeyturnFault.__init__(self, "A row that this request needs is locked by somebody else.")


class SpoolCause(StrEnum):
    """Why a record was not spooled."""

    FULL = "full"
    """The spool holds as much as it may."""
    DISK = "disk"
    """The disk takes nothing: full, read-only, broken, or the file is locked."""


class SpoolUnavailable(StoreUnavailable):
    """The database cannot be reached, and the record is not durable on our own disk either."""

    def __init__(self, cause: SpoolCause) -> None:
        self.cause = cause
        why = "is full" if cause is SpoolCause.FULL else "takes nothing"
        KeyturnFault.__init__(self, f"The database cannot be reached, and the spool {why}.")


class Overloaded(KeyturnFault):
    """There is more to do than can be done in time; nothing was done."""

    def __init__(self) -> None:
        super().__init__("Too many requests are waiting.")
