//! One request from its decision to its record.

use std::fmt;
use std::time::Duration;

use http::HeaderMap;

use crate::client::Client;
use crate::error::{Denied, Error, RequestError};
use crate::model::{CreditTicket, DecideRequest, Decision, KeyHandle, RecordRequest, Recorded, Route, Usage};
use crate::secret::Secret;
use crate::words::Outcome;

/// One request from its decision to its record: what [`Client::request`] gives.
///
/// It ends by [`Call::finish`], or by being dropped, which hands its record to the background. What is
/// recorded:
///
/// - the outcome given to [`Call::failed`], whatever else was said;
/// - SUCCESS, where [`Call::succeeded`] was said, and by `finish`;
/// - else, when it is dropped without a word: CLIENT_CANCELLED with what was noted if the request had gone
///   out, and NEVER_SENT if it had not.
///
/// The request counts as gone out once [`Call::headers`] or [`Call::secret`] was taken, [`Call::sending`] was
/// called, or usage or a cost was noted.
///
/// A call that ended refuses everything but reading, with [`Error::Invalid`].
#[must_use = "a call that is dropped at once is recorded as NEVER_SENT"]
pub struct Call {
    client: Client,
    request: DecideRequest,
    /// Nobody else knows the request id.
    owned: bool,
    decision: Decision,
    open: bool,
    noted: Noted,
    unrecorded: Option<RecordRequest>,
}

/// What is known of the request on the route in force.
#[derive(Default)]
struct Noted {
    gone_out: bool,
    succeeded: bool,
    failed: Option<Outcome>,
    usage: Option<Usage>,
    cost_micros: Option<i64>,
    note: Note,
    failure: Failure,
}

/// What else there is to say of a request. What is not given stays as it was.
#[derive(Clone, Debug, Default)]
pub struct Note {
    /// The model that answered.
    pub model: Option<String>,
    /// The provider's endpoint, e.g. `/v1/chat/completions`.
    pub endpoint: Option<String>,
    /// How long the provider took.
    pub response_time: Option<Duration>,
    /// The provider's HTTP status.
    pub http_status: Option<u16>,
}

/// What the provider said when it refused or failed.
#[derive(Clone, Default)]
pub struct Failure {
    /// The HTTP status.
    pub http_status: Option<u16>,
    /// The error text, of which 500 characters are sent; the sidecar strikes out keys.
    pub error_message: String,
    /// How long the provider asked to wait.
    pub retry_after: Option<Duration>,
}

impl Failure {
    /// One with this HTTP status, and nothing else known.
    pub fn status(http_status: u16) -> Self {
        Self { http_status: Some(http_status), ..Self::default() }
    }
}

/// Leaves out the provider's error text, which may quote a key.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failure")
            .field("http_status", &self.http_status)
            .field("retry_after", &self.retry_after)
            .finish_non_exhaustive()
    }
}

impl Call {
    pub(crate) async fn begin(
        client: Client,
        mut request: DecideRequest,
        owned: bool,
    ) -> Result<Self, RequestError> {
        request.redeem = false; // the secret is needed here
        let decision = allowed(client.decide_as(&request, owned).await?)?;
        Ok(Self { client, request, owned, decision, open: true, noted: Noted::default(), unrecorded: None })
    }

    /// The id that makes a repeated decision find the first hold.
    pub fn request_id(&self) -> &str {
        self.request.request_id.as_deref().unwrap_or_default()
    }

    /// The decision in force: the latest, after [`Call::key_refused`].
    pub fn decision(&self) -> &Decision {
        &self.decision
    }

    /// The user's own key, when that pays.
    pub fn key(&self) -> Option<&KeyHandle> {
        self.decision.key()
    }

    /// The hold on the user's credits, when those pay.
    pub fn ticket(&self) -> Option<&CreditTicket> {
        self.decision.ticket()
    }

    /// Another deadline for what this call does from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.client = self.client.with_timeout(timeout);
    }

    /// The record of a [`Call::finish`] that failed: [`Client::record_later`] takes it.
    pub fn unrecorded(&self) -> Option<&RecordRequest> {
        self.unrecorded.as_ref()
    }

    /// The headers that sign the request: the own key's, or `platform` when credits pay.
    ///
    /// Taking them means that the request goes out.
    pub fn headers(&mut self, platform: &HeaderMap) -> Result<HeaderMap, Error> {
        self.require_open()?;
        let headers = match self.key() {
            Some(key) => key.headers()?,
            None => platform.clone(),
        };
        self.sending()?;
        Ok(headers)
    }

    /// The own key's secret, for libraries that sign by themselves; nothing when credits pay.
    ///
    /// Taking it means that the request goes out.
    pub fn secret(&mut self) -> Result<Option<&Secret>, Error> {
        self.sending()?;
        Ok(self.key().and_then(|key| key.secret.as_ref()))
    }

    /// The request goes out now; for callers that need neither `headers` nor `secret`.
    pub fn sending(&mut self) -> Result<(), Error> {
        self.require_open()?;
        self.noted.gone_out = true;
        Ok(())
    }

    /// Notes tokens used. A count given again replaces the earlier one; the others stay.
    pub fn used(&mut self, usage: Usage) -> Result<(), Error> {
        self.sending()?;
        self.noted.usage = Some(usage.over(self.noted.usage.unwrap_or_default()));
        Ok(())
    }

    /// Notes what the request cost, in micros. It wins over tokens.
    pub fn cost(&mut self, micros: i64) -> Result<(), Error> {
        self.sending()?;
        self.noted.cost_micros = Some(micros);
        Ok(())
    }

    /// Notes what else is known.
    pub fn note(&mut self, note: Note) -> Result<(), Error> {
        self.require_open()?;
        let before = std::mem::take(&mut self.noted.note);
        self.noted.note = Note {
            model: note.model.or(before.model),
            endpoint: note.endpoint.or(before.endpoint),
            response_time: note.response_time.or(before.response_time),
            http_status: note.http_status.or(before.http_status),
        };
        Ok(())
    }

    /// The provider answered.
    pub fn succeeded(&mut self) -> Result<(), Error> {
        self.require_open()?;
        self.noted.succeeded = true;
        Ok(())
    }

    /// Says how the request ended, when it was no success.
    ///
    /// # Errors
    /// [`Error::Invalid`] for SUCCESS.
    pub fn failed(&mut self, outcome: Outcome, failure: Failure) -> Result<(), Error> {
        self.require_open()?;
        if outcome == Outcome::Success {
            return Err(Error::invalid("SUCCESS is no failure: say succeeded"));
        }
        self.noted.failed = Some(outcome);
        self.noted.failure = failure;
        Ok(())
    }

    /// The provider refused the own key: records that, and decides again without it, with the same request id.
    ///
    /// With `Ok` a new decision is in force, and nothing is noted about it. The record is that of a failure,
    /// e.g. of AUTH_REJECTED with [`Failure::status`]`(401)`; where it does not get through, it is what the
    /// call's end records.
    ///
    /// # Errors
    /// [`RequestError::Denied`] when nobody else may pay: the call has ended then. [`Error::Invalid`] when
    /// there is no own key to refuse.
    pub async fn key_refused(&mut self, outcome: Outcome, failure: Failure) -> Result<(), RequestError> {
        self.require_open()?;
        let Some(refused) = self.key().map(|key| key.handle.clone()) else {
            return Err(Error::invalid("there is no own key to refuse").into());
        };
        self.failed(outcome, failure)?;
        self.client.record(self.record(outcome)?).await?;
        self.open = false;
        self.request.failed_keys.push(refused);
        self.decision = allowed(self.client.decide_as(&self.request, self.owned).await?)?;
        self.noted = Noted::default();
        self.open = true;
        Ok(())
    }

    /// Ends the call, and records it: nothing comes of it for an unmetered one.
    ///
    /// # Errors
    /// Those of [`Client::record`]; the record is [`Call::unrecorded`] then. When the future is dropped, the
    /// record is carried on in the background.
    pub async fn finish(&mut self) -> Result<Option<Recorded>, Error> {
        self.require_open()?;
        let Some(record) = self.end(Outcome::Success) else {
            return Ok(None);
        };
        self.unrecorded = Some(record.clone());
        let recorded = self.client.record(record).await?;
        self.unrecorded = None;
        Ok(Some(recorded))
    }

    fn require_open(&self) -> Result<(), Error> {
        if self.open { Ok(()) } else { Err(Error::invalid("this call has ended")) }
    }

    /// What there is to record now that the call has ended; `unsaid` is the outcome when none was said.
    fn end(&mut self, unsaid: Outcome) -> Option<RecordRequest> {
        self.open = false;
        let said = self.noted.succeeded.then_some(Outcome::Success);
        self.record(self.noted.failed.or(said).unwrap_or(unsaid)).ok()
    }

    fn record(&self, outcome: Outcome) -> Result<RecordRequest, Error> {
        let Noted { usage, cost_micros, note, failure, .. } = &self.noted;
        Ok(RecordRequest {
            usage: *usage,
            cost_micros: *cost_micros,
            model: note.model.clone().unwrap_or_default(),
            endpoint: note.endpoint.clone().unwrap_or_default(),
            response_time: note.response_time,
            http_status: failure.http_status.or(note.http_status),
            error_message: failure.error_message.clone(),
            retry_after: failure.retry_after,
            ..RecordRequest::new(self.decision.settles()?, outcome)
        })
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if self.open {
            let unsaid = if self.noted.gone_out { Outcome::ClientCancelled } else { Outcome::NeverSent };
            if let Some(record) = self.end(unsaid) {
                self.client.record_or_report(record);
            }
        }
    }
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call")
            .field("request_id", &self.request_id())
            .field("decision", &self.decision)
            .field("open", &self.open)
            .finish_non_exhaustive()
    }
}

fn allowed(decision: Decision) -> Result<Decision, RequestError> {
    match decision.route {
        Route::Key(_) | Route::Ticket(_) | Route::Unmetered => Ok(decision),
        Route::Denial(_) | Route::Unrecognized => Err(RequestError::Denied(Box::new(Denied { decision }))),
    }
}
