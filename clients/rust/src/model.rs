//! What the client takes and gives: plain values, with no protobuf in them.
//!
//! Money is in micros (1 USD = 1,000,000).

use std::fmt;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::error::Error;
use crate::secret::{SealedHandle, SealedTicket, Secret};
use crate::words::{Constraint, CostSource, DenialReason, Durability, KeyState, Mode, Outcome, Reason};

/// One request that a gateway is about to make for a user.
///
/// ```
/// # use keyturn::DecideRequest;
/// let request = DecideRequest { model: "gpt-4o".into(), ..DecideRequest::new("u1", "openai") };
/// ```
#[derive(Clone, Debug)]
pub struct DecideRequest {
    /// The user who makes the request.
    pub user_id: String,
    /// An id in `api_providers`, e.g. `openai`.
    pub provider: String,
    /// The provider's name of the model; prices the estimate.
    pub model: String,
    /// A label for reports, e.g. `copilot`.
    pub service_type: String,
    /// The same id by the same user never places a second hold. Nothing: a new one is made.
    pub request_id: Option<String>,
    /// The estimate as a cost. With neither a cost nor tokens: the sidecar's default hold; with both
    /// the request is refused.
    pub cost_micros: Option<i64>,
    /// The estimate as tokens, priced by `model`.
    pub input_tokens: Option<i64>,
    /// The estimate as tokens, priced by `model`.
    pub max_output_tokens: Option<i64>,
    /// Tightens the policy.
    pub constraint: Constraint,
    /// Keys of earlier decisions of this request that the provider refused: they are left out.
    pub failed_keys: Vec<SealedHandle>,
    /// The answer has no secret; fetch it once with [`Client::redeem`](crate::Client::redeem). Not for
    /// [`Client::request`](crate::Client::request), which needs it.
    pub redeem: bool,
    /// How long the hold or the handle lives, 1 s to 24 h. Nothing: the sidecar's 10 minutes.
    pub hold_ttl: Option<Duration>,
}

impl DecideRequest {
    /// A request with all that is optional left out.
    pub fn new(user_id: impl Into<String>, provider: impl Into<String>) -> Self {
        Self {
            user_id: user_id.into(),
            provider: provider.into(),
            model: String::new(),
            service_type: String::new(),
            request_id: None,
            cost_micros: None,
            input_tokens: None,
            max_output_tokens: None,
            constraint: Constraint::Any,
            failed_keys: Vec::new(),
            redeem: false,
            hold_ttl: None,
        }
    }
}

/// Whose credential pays.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Decision {
    /// The id of this decision, and of its record later.
    pub decision_id: String,
    /// The mode in force.
    pub mode: Mode,
    /// Why this route.
    pub reason: Reason,
    /// One plain sentence for logs and support.
    pub message: String,
    /// Made from cached data, because the database could not be asked.
    pub degraded: bool,
    /// `request_id` was seen before, and this is its first ticket again.
    pub replayed: bool,
    /// The answer itself.
    pub route: Route,
}

/// Who pays.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Route {
    /// The user's own key.
    Key(KeyHandle),
    /// The user's credits.
    Ticket(CreditTicket),
    /// Nobody.
    Denial(Denial),
    /// The platform, unrecorded: the sidecar was down, and `when_down` let the request pass.
    Unmetered,
    /// A route that only a newer sidecar knows. It is not allowed.
    Unrecognized,
}

impl Decision {
    /// The user's own key, when that pays.
    pub fn key(&self) -> Option<&KeyHandle> {
        match &self.route {
            Route::Key(key) => Some(key),
            _ => None,
        }
    }

    /// The hold on the user's credits, when those pay.
    pub fn ticket(&self) -> Option<&CreditTicket> {
        match &self.route {
            Route::Ticket(ticket) => Some(ticket),
            _ => None,
        }
    }

    /// Why nobody's credential may pay.
    pub fn denial(&self) -> Option<&Denial> {
        match &self.route {
            Route::Denial(denial) => Some(denial),
            _ => None,
        }
    }

    /// Whether the sidecar was down and `when_down` let the request pass: nothing is recorded for it.
    pub fn unmetered(&self) -> bool {
        matches!(self.route, Route::Unmetered)
    }

    /// Whether the request may go ahead.
    pub fn allowed(&self) -> bool {
        matches!(self.route, Route::Key(_) | Route::Ticket(_) | Route::Unmetered)
    }

    /// What a record of this decision settles.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is nothing to record: the decision is denied or unmetered.
    pub fn settles(&self) -> Result<Settles, Error> {
        match &self.route {
            Route::Key(key) => Ok(key.into()),
            Route::Ticket(ticket) => Ok(ticket.into()),
            Route::Unmetered => Err(Error::invalid("an unmetered decision has nothing to record")),
            Route::Denial(_) | Route::Unrecognized => {
                Err(Error::invalid("a denied decision has nothing to record"))
            }
        }
    }

    pub(crate) fn pass() -> Self {
        Self {
            decision_id: String::new(),
            mode: Mode::Unspecified,
            reason: Reason::Unspecified,
            message: "The sidecar is down, and the gateway lets requests pass.".into(),
            degraded: false,
            replayed: false,
            route: Route::Unmetered,
        }
    }
}

/// The user's own key for one request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct KeyHandle {
    /// Opaque and sealed.
    pub handle: SealedHandle,
    /// The id of the stored key.
    pub key_id: String,
    /// The provider the key is for.
    pub provider: String,
    /// The last four characters of the secret, to show to its owner.
    pub hint: String,
    /// Nothing when it was left to [`Client::redeem`](crate::Client::redeem).
    pub secret: Option<Secret>,
    /// The header that the provider wants its key in.
    pub auth_header: String,
    /// What stands before the secret in that header.
    pub auth_prefix: String,
    /// Where the provider's API is, e.g. `https://api.openai.com/v1`.
    pub base_url: String,
    /// Until when it may be redeemed; a record is taken 7 days longer. Nothing in an explanation.
    pub expires_at: Option<SystemTime>,
}

impl KeyHandle {
    /// The one header that signs a request with this key, marked as sensitive so that it does not print.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the secret was not delivered, or makes no header.
    pub fn headers(&self) -> Result<HeaderMap, Error> {
        let Some(secret) = &self.secret else {
            return Err(Error::invalid("the secret is not here: fetch it once with redeem"));
        };
        let name = HeaderName::from_bytes(self.auth_header.as_bytes());
        let value = HeaderValue::from_str(&format!("{}{}", self.auth_prefix, secret.reveal()));
        let (Ok(name), Ok(mut value)) = (name, value) else {
            return Err(Error::invalid("the key makes no HTTP header"));
        };
        value.set_sensitive(true);
        Ok(HeaderMap::from_iter([(name, value)]))
    }
}

/// A hold on the user's prepaid balance for one request.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CreditTicket {
    /// Opaque and sealed.
    pub ticket: SealedTicket,
    /// How much is held.
    pub hold_micros: i64,
    /// What the user can still spend after this hold.
    pub available_micros: i64,
    /// When the hold is released by itself. Nothing in an explanation.
    pub expires_at: Option<SystemTime>,
}

/// Why nobody's credential may pay.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Denial {
    /// For programs.
    pub reason: DenialReason,
    /// The same request may well succeed later with nothing else changed.
    pub retryable: bool,
    /// With `retryable`: how long to wait at least.
    pub retry_after: Option<Duration>,
    /// What the user or an operator can do about it: one sentence.
    pub suggestion: String,
}

/// What `decide` would answer now, with no id, handle, ticket or secret, and the way to it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Explanation {
    /// The answer.
    pub decision: Decision,
    /// The way to it, in order.
    pub steps: Vec<ExplainStep>,
}

/// One step on the way to a decision.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExplainStep {
    /// What was looked at.
    pub check: String,
    /// What was found.
    pub result: String,
    /// What it means here.
    pub detail: String,
}

/// Tokens used. A count that is not given is not known; with none given, no usage is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// All input tokens, cached ones included.
    pub input_tokens: Option<i64>,
    /// All output tokens, reasoning included.
    pub output_tokens: Option<i64>,
    /// Of the input: read from the provider's cache.
    pub cache_read_tokens: Option<i64>,
    /// Of the input: written to the provider's cache.
    pub cache_write_tokens: Option<i64>,
    /// The total as the provider counts it.
    pub total_tokens: Option<i64>,
}

impl Usage {
    /// These counts, and the earlier ones where none is given.
    pub(crate) fn over(self, earlier: Self) -> Self {
        Self {
            input_tokens: self.input_tokens.or(earlier.input_tokens),
            output_tokens: self.output_tokens.or(earlier.output_tokens),
            cache_read_tokens: self.cache_read_tokens.or(earlier.cache_read_tokens),
            cache_write_tokens: self.cache_write_tokens.or(earlier.cache_write_tokens),
            total_tokens: self.total_tokens.or(earlier.total_tokens),
        }
    }
}

/// What a record settles: the sealed text of a key or of a ticket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settles {
    /// That of a key.
    Handle(SealedHandle),
    /// That of a ticket.
    Ticket(SealedTicket),
}

impl From<SealedHandle> for Settles {
    fn from(handle: SealedHandle) -> Self {
        Self::Handle(handle)
    }
}

impl From<SealedTicket> for Settles {
    fn from(ticket: SealedTicket) -> Self {
        Self::Ticket(ticket)
    }
}

impl From<&KeyHandle> for Settles {
    fn from(key: &KeyHandle) -> Self {
        Self::Handle(key.handle.clone())
    }
}

impl From<&CreditTicket> for Settles {
    fn from(ticket: &CreditTicket) -> Self {
        Self::Ticket(ticket.ticket.clone())
    }
}

/// What became of one request.
#[derive(Clone, PartialEq, Eq)]
pub struct RecordRequest {
    /// What the decision gave.
    pub settles: Settles,
    /// How the request ended.
    pub outcome: Outcome,
    /// Absent is not zero: it means that the caller does not know.
    pub usage: Option<Usage>,
    /// What the request cost, when the caller knows; wins over `usage`.
    pub cost_micros: Option<i64>,
    /// The model that answered, when it is not the one of the decision.
    pub model: String,
    /// The provider's endpoint, e.g. `/v1/chat/completions`.
    pub endpoint: String,
    /// How long the provider took.
    pub response_time: Option<Duration>,
    /// The provider's HTTP status.
    pub http_status: Option<u16>,
    /// The provider's error text, of which 500 characters are sent; the sidecar strikes out keys.
    pub error_message: String,
    /// How long the provider asked to wait.
    pub retry_after: Option<Duration>,
}

impl RecordRequest {
    /// A record with all that is optional left out.
    pub fn new(settles: impl Into<Settles>, outcome: Outcome) -> Self {
        Self {
            settles: settles.into(),
            outcome,
            usage: None,
            cost_micros: None,
            model: String::new(),
            endpoint: String::new(),
            response_time: None,
            http_status: None,
            error_message: String::new(),
            retry_after: None,
        }
    }
}

/// Leaves out the provider's error text, which may quote a key.
impl fmt::Debug for RecordRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RecordRequest")
            .field("settles", &self.settles)
            .field("outcome", &self.outcome)
            .field("usage", &self.usage)
            .field("cost_micros", &self.cost_micros)
            .field("http_status", &self.http_status)
            .finish_non_exhaustive()
    }
}

/// A record as it was taken.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Recorded {
    /// That of its decision.
    pub record_id: String,
    /// What the user's balance was charged; always 0 for an own key.
    pub charged_micros: i64,
    /// What was held and not charged.
    pub released_micros: i64,
    /// The balance after the charge, which may be below zero. Nothing for an own key.
    pub balance_micros: Option<i64>,
    /// Where the cost comes from.
    pub cost_source: CostSource,
    /// It was taken before, and this is its first answer again.
    pub replayed: bool,
    /// Where it is durable.
    pub durability: Durability,
    /// An own key's state after this record.
    pub key_state: KeyState,
}

/// A record that was not sent, and why.
#[derive(Clone, Debug)]
pub struct Unsent {
    /// The record, to be given to [`Client::record_many`](crate::Client::record_many) later.
    pub record: RecordRequest,
    /// Why.
    pub error: Error,
}

impl fmt::Display for Unsent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a record with the outcome {} was not sent: {}", self.record.outcome, self.error)
    }
}

impl std::error::Error for Unsent {}
