"""One request from its decision to its record: what `client.request(...)` gives.

`CallState` is everything but the talking; `client.Call` and `aio.AsyncCall` add that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta

from keyturn._client import ClientState
from keyturn.errors import Denied
from keyturn.model import (
    CreditTicket,
    DecideRequest,
    Decision,
    KeyHandle,
    Outcome,
    Recorded,
    RecordFields,
    RecordRequest,
    RequestFields,
    Usage,
)
from keyturn.secret import Secret


class CallState:
    """What a call knows: its route, whether it went out, and what there is to record.

    What is recorded when the block ends:

    - an outcome given with `failed`: that one, however the block ended;
    - the block ended normally, or said `succeeded`: SUCCESS;
    - it raised (cancellation, KeyboardInterrupt and GeneratorExit too) after the request had gone
      out: CLIENT_CANCELLED, with the usage so far;
    - it raised before: NEVER_SENT.

    The request counts as gone out once `headers` or `secret` was taken, `sending` was called, or
    usage or a cost was noted. A block that decides not to send at all says so with
    `failed(Outcome.NEVER_SENT)`; otherwise SUCCESS with nothing noted charges the hold.

    What notes or takes something raises `RuntimeError` outside the block; `decision`, `key`,
    `ticket` and `recorded` can be read after it. An unmetered call records nothing.
    """

    recorded: Recorded | None = None
    """The answer to the record, once the block has ended. None when that went to the background."""
    unrecorded: RecordRequest | None = None
    """The record that failed at the block's end; `record_many` takes it later."""

    def __init__(self, fields: RequestFields) -> None:
        self._request = DecideRequest(**fields, redeem=False)  # a block needs the secret inline
        self._owned = not fields.get("request_id")
        self._decision: Decision | None = None
        self._entered = False
        self._open = False
        self._gone_out = False
        self._succeeded = False
        self._outcome: Outcome | None = None
        self._noted: RecordFields = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.request_id}: {self._decision}>"

    @property
    def is_open(self) -> bool:
        """Decided, and not ended."""
        return self._open

    @property
    def request_id(self) -> str:
        """The id that makes a repeated decision find the first hold."""
        return self._request.request_id or ""

    @property
    def decision(self) -> Decision:
        """The decision in force: the latest, after `key_refused`."""
        if self._decision is None:
            raise RuntimeError("nothing is decided yet: enter the `with` block first")
        return self._decision

    @property
    def key(self) -> KeyHandle | None:
        """The user's own key, when that pays."""
        return self.decision.key

    @property
    def ticket(self) -> CreditTicket | None:
        """The hold on the user's credits, when those pay."""
        return self.decision.ticket

    @property
    def secret(self) -> Secret | None:
        """The own key's secret, for clients that sign by themselves; None when credits pay.

        Taking it means that the request goes out.
        """
        self.sending()
        return self.key.secret if self.key is not None else None

    def headers(self, platform: Mapping[str, str]) -> dict[str, str]:
        """The headers that sign the request: the own key's, or `platform` when credits pay.

        Taking them means that the request goes out. They hold a secret: never log them.
        """
        self.sending()
        return self.key.headers() if self.key is not None else dict(platform)

    def sending(self) -> None:
        """The request goes out now; for callers that need neither `headers` nor `secret`."""
        self._require_open()
        self._gone_out = True

    def used(
        self,
        *,
        input_tokens: int | None = None,
        output_tokens: int | None = None,
        cache_read_tokens: int | None = None,
        cache_write_tokens: int | None = None,
        total_tokens: int | None = None,
    ) -> None:
        """Note tokens used. A count given again replaces the earlier one; the others stay."""
        self.sending()
        before = self._noted.get("usage") or Usage()
        self._noted["usage"] = Usage(
            input_tokens=before.input_tokens if input_tokens is None else input_tokens,
            output_tokens=before.output_tokens if output_tokens is None else output_tokens,
            cache_read_tokens=(before.cache_read_tokens if cache_read_tokens is None else cache_read_tokens),
            cache_write_tokens=(
                before.cache_write_tokens if cache_write_tokens is None else cache_write_tokens
            ),
            total_tokens=before.total_tokens if total_tokens is None else total_tokens,
        )

    def cost(self, micros: int) -> None:
        """Note what the request cost, in micros. It wins over tokens."""
        self.sending()
        self._noted["cost_micros"] = micros

    def succeeded(self) -> None:
        """The provider answered: SUCCESS is recorded, even if the block raises after this.

        A block that ends normally says so by itself.
        """
        self.sending()
        self._succeeded = True

    def failed(
        self,
        outcome: Outcome,
        *,
        http_status: int | None = None,
        error_message: str = "",
        retry_after: timedelta | None = None,
    ) -> None:
        """Say how the request ended. Charges what `Outcome` says in the contract.

        Raises `ValueError` for SUCCESS: a block that ends normally says that.
        """
        self._require_open()
        if outcome == Outcome.SUCCESS:
            raise ValueError("SUCCESS is no failure: let the block end")
        self._outcome = outcome
        self._noted["http_status"] = http_status
        self._noted["error_message"] = error_message
        self._noted["retry_after"] = retry_after

    def note(
        self,
        *,
        model: str | None = None,
        endpoint: str | None = None,
        response_time: timedelta | None = None,
        http_status: int | None = None,
    ) -> None:
        """Note what else is known: the model that answered, the endpoint, how long it took."""
        self._require_open()
        if model is not None:
            self._noted["model"] = model
        if endpoint is not None:
            self._noted["endpoint"] = endpoint
        if response_time is not None:
            self._noted["response_time"] = response_time
        if http_status is not None:
            self._noted["http_status"] = http_status

    # ------------------------------------------------------------- for Call and AsyncCall

    def _require_open(self) -> None:
        if not self._open:
            raise RuntimeError("this call is not open: use it inside its `with` block")

    def _enter(self) -> DecideRequest:
        if self._entered:
            raise RuntimeError("a call is used once: make another with request()")
        self._entered = True
        return self._request

    def _take(self, decision: Decision) -> None:
        """A new route, with nothing noted about it. Raises `Denied` when there is none."""
        self._gone_out = False
        self._succeeded = False
        self._outcome = None
        self._noted = {}
        if not decision.allowed:
            raise Denied(decision)
        self._decision = decision
        self._open = True

    def _refuse(
        self,
        outcome: Outcome,
        http_status: int | None,
        error_message: str,
        retry_after: timedelta | None,
    ) -> RecordRequest:
        """The record of a refused key. Until it got through, it is what the block's end records."""
        self._require_open()
        if self.key is None:
            raise RuntimeError("credits pay for this call: there is no own key to refuse")
        if http_status is None and outcome is Outcome.AUTH_REJECTED:
            http_status = 401
        self.failed(outcome, http_status=http_status, error_message=error_message, retry_after=retry_after)
        return RecordRequest(self.key, outcome, **self._noted)

    def _refused(self) -> None:
        """The refusal is recorded: next ask without that key, with the same request id."""
        self._open = False
        refused = self.decision.key
        if refused is not None:
            failed_keys = (*self._request.failed_keys, refused)
            self._request = replace(self._request, failed_keys=failed_keys)

    def _close(self, raised: BaseException | None) -> RecordRequest | None:
        """What there is to record now that the call has ended."""
        if not self._open:
            return None
        self._open = False
        if self.decision.unmetered:
            return None
        if self._outcome is not None:
            outcome = self._outcome
        elif raised is None or self._succeeded:
            outcome = Outcome.SUCCESS
        else:
            outcome = Outcome.CLIENT_CANCELLED if self._gone_out else Outcome.NEVER_SENT
        return RecordRequest(self.decision, outcome, **self._noted)

    def _leave_to(self, client: ClientState) -> None:
        """End the call where nobody can wait, as by an exception, with its record for the background."""
        record = self._close(GeneratorExit())
        if record is not None:
            client._hand_over(record)

    def _closed(self, recorded: Recorded) -> None:
        self.recorded = recorded
        self.unrecorded = None


def not_recorded(record: RecordRequest, failure: BaseException) -> str:
    """The note on the exception of a block whose record did not get through."""
    what = f"{type(failure).__name__}: {failure}"
    return f"keyturn: its outcome {record.outcome} was not recorded: {what}"
