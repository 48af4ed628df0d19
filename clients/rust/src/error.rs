//! What goes wrong.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use prost::Message;
use tonic::Status;

use crate::model::Decision;
use crate::pb;

/// A call that got no answer. It prints no secret, and is fit for logs.
///
/// A refusal by policy is no error: it is a [`Decision`] with a denial, which
/// [`Client::request`](crate::Client::request) alone turns into [`Denied`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Error {
    /// A field is wrong (`field_violations`), or a handle or ticket is garbled.
    InvalidArgument(Box<Fault>),
    /// No token or certificate, or one that the sidecar does not know.
    Unauthenticated(Box<Fault>),
    /// The caller's role may not do this.
    PermissionDenied(Box<Fault>),
    /// No such user, or a hold that was settled and forgotten (`resource`).
    NotFound(Box<Fault>),
    /// The same request or record was seen before, with other contents.
    AlreadyExists(Box<Fault>),
    /// Too late, redeemed already, or no longer usable.
    FailedPrecondition(Box<Fault>),
    /// The sidecar is overloaded, or the message is too large.
    ResourceExhausted(Box<Fault>),
    /// The sidecar or its store is out of reach, after all retries that the deadline allowed. CANCELLED by the
    /// other side is this too: a sidecar that ends drops so what it has not looked at yet.
    Unavailable(Box<Fault>),
    /// No answer in time; the call may have been carried out. [`Error::is_unavailable`] counts it in.
    DeadlineExceeded(Box<Fault>),
    /// A defect of the sidecar; `metadata` may hold its error id.
    Internal(Box<Fault>),
    /// Any other status.
    Other(Box<Fault>),
    /// Refused by the client before anything was sent: what is wrong, in a sentence.
    Invalid(Cow<'static, str>),
    /// The queue of records in the background is full.
    QueueFull,
    /// The client is closed.
    Closed,
}

/// What the sidecar, or the way to it, said.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Fault {
    /// The gRPC status.
    pub code: Code,
    /// The stable name for programs, e.g. `STORE_UNAVAILABLE`; may be empty.
    pub reason: String,
    /// One plain sentence.
    pub message: String,
    /// The fields that were refused.
    pub field_violations: Vec<FieldViolation>,
    /// How long the sidecar asks to wait.
    pub retry_after: Option<Duration>,
    /// What was not found.
    pub resource: Option<Resource>,
    /// What there is besides, e.g. an error id to quote to the operators.
    pub metadata: BTreeMap<String, String>,
}

/// A field that the sidecar refused, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FieldViolation {
    /// E.g. `user_id`.
    pub field: String,
    /// Why.
    pub description: String,
}

/// What was not found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Resource {
    /// E.g. `user`.
    pub kind: String,
    /// Its id.
    pub name: String,
    /// More about it; may be empty.
    pub description: String,
}

macro_rules! codes {
    ($($name:ident $word:literal)*) => {
        /// The gRPC status of a fault. Prints as `NOT_FOUND`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "gRPC has them")]
        #[non_exhaustive]
        pub enum Code { $($name,)* }

        impl fmt::Display for Code {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$name => $word,)* })
            }
        }

        impl From<tonic::Code> for Code {
            fn from(code: tonic::Code) -> Self {
                match code {
                    $(tonic::Code::$name => Self::$name,)*
                    tonic::Code::Ok => Self::Unknown,
                }
            }
        }
    };
}

codes! {
    Cancelled "CANCELLED"
    Unknown "UNKNOWN"
    InvalidArgument "INVALID_ARGUMENT"
    DeadlineExceeded "DEADLINE_EXCEEDED"
    NotFound "NOT_FOUND"
    AlreadyExists "ALREADY_EXISTS"
    PermissionDenied "PERMISSION_DENIED"
    ResourceExhausted "RESOURCE_EXHAUSTED"
    FailedPrecondition "FAILED_PRECONDITION"
    Aborted "ABORTED"
    OutOfRange "OUT_OF_RANGE"
    Unimplemented "UNIMPLEMENTED"
    Internal "INTERNAL"
    Unavailable "UNAVAILABLE"
    DataLoss "DATA_LOSS"
    Unauthenticated "UNAUTHENTICATED"
}

impl Error {
    /// What the sidecar said; nothing for what the client refused by itself.
    pub fn fault(&self) -> Option<&Fault> {
        match self {
            Self::InvalidArgument(fault)
            | Self::Unauthenticated(fault)
            | Self::PermissionDenied(fault)
            | Self::NotFound(fault)
            | Self::AlreadyExists(fault)
            | Self::FailedPrecondition(fault)
            | Self::ResourceExhausted(fault)
            | Self::Unavailable(fault)
            | Self::DeadlineExceeded(fault)
            | Self::Internal(fault)
            | Self::Other(fault) => Some(fault),
            Self::Invalid(_) | Self::QueueFull | Self::Closed => None,
        }
    }

    /// The gRPC status.
    pub fn code(&self) -> Option<Code> {
        self.fault().map(|fault| fault.code)
    }

    /// The stable name for programs; may be empty.
    pub fn reason(&self) -> &str {
        self.fault().map_or("", |fault| &fault.reason)
    }

    /// How long the sidecar asks to wait.
    pub fn retry_after(&self) -> Option<Duration> {
        self.fault()?.retry_after
    }

    /// Whether the sidecar or its store is out of reach: `Unavailable` or `DeadlineExceeded`.
    pub fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::DeadlineExceeded(_))
    }

    pub(crate) fn invalid(what: impl Into<Cow<'static, str>>) -> Self {
        Self::Invalid(what.into())
    }

    pub(crate) fn new(code: Code, message: impl Into<String>) -> Self {
        Self::of(Fault::new(code, message))
    }

    /// The error of a failed call, with the details of its trailers.
    pub(crate) fn from_status(status: &Status) -> Self {
        // Garbled details never mask the status itself.
        let details = pb::Status::decode(status.details()).unwrap_or_default().details;
        let code = match status.code() {
            // Not by us: a future that was dropped gets no error. It is what gRPC's core makes of calls that a
            // server which ends has not looked at yet (github.com/grpc/grpc/issues/41785).
            tonic::Code::Cancelled if details.is_empty() => tonic::Code::Unavailable,
            code => code,
        };
        Self::with_details(code, status.message(), &details)
    }

    /// The error of one item of a batch.
    pub(crate) fn from_item(status: &pb::Status) -> Self {
        Self::with_details(tonic::Code::from_i32(status.code), &status.message, &status.details)
    }

    fn with_details(code: tonic::Code, message: &str, details: &[prost_types::Any]) -> Self {
        let mut fault = Fault::new(code.into(), message);
        for detail in details {
            fault.add(detail);
        }
        Self::of(fault)
    }

    fn of(fault: Fault) -> Self {
        let fault = Box::new(fault);
        match fault.code {
            Code::InvalidArgument => Self::InvalidArgument(fault),
            Code::Unauthenticated => Self::Unauthenticated(fault),
            Code::PermissionDenied => Self::PermissionDenied(fault),
            Code::NotFound => Self::NotFound(fault),
            Code::AlreadyExists => Self::AlreadyExists(fault),
            Code::FailedPrecondition => Self::FailedPrecondition(fault),
            Code::ResourceExhausted => Self::ResourceExhausted(fault),
            Code::Unavailable => Self::Unavailable(fault),
            Code::DeadlineExceeded => Self::DeadlineExceeded(fault),
            Code::Internal | Code::Unknown | Code::DataLoss => Self::Internal(fault),
            Code::Cancelled | Code::Aborted | Code::OutOfRange | Code::Unimplemented => Self::Other(fault),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(what) => f.write_str(what),
            Self::QueueFull => f.write_str("the queue of records is full"),
            Self::Closed => f.write_str("the client is closed"),
            _ => self.fault().map_or(Ok(()), |fault| fault.fmt(f)),
        }
    }
}

impl StdError for Error {}

impl Fault {
    fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: String::new(),
            message: message.into(),
            field_violations: Vec::new(),
            retry_after: None,
            resource: None,
            metadata: BTreeMap::new(),
        }
    }

    /// Takes in one of the details of `google.rpc`; one that is garbled or unknown is left out.
    fn add(&mut self, detail: &prost_types::Any) {
        let data = detail.value.as_slice();
        match detail.type_url.rsplit('/').next() {
            Some("google.rpc.ErrorInfo") => {
                if let Ok(info) = details::ErrorInfo::decode(data) {
                    self.reason = info.reason;
                    self.metadata = info.metadata;
                }
            }
            Some("google.rpc.BadRequest") => {
                if let Ok(bad) = details::BadRequest::decode(data) {
                    let violations = bad.field_violations.into_iter();
                    self.field_violations = violations
                        .map(|each| FieldViolation { field: each.field, description: each.description })
                        .collect();
                }
            }
            Some("google.rpc.RetryInfo") => {
                if let Ok(info) = details::RetryInfo::decode(data) {
                    // A negative wait is none.
                    self.retry_after = info.retry_delay.map(|delay| delay.try_into().unwrap_or_default());
                }
            }
            Some("google.rpc.ResourceInfo") => {
                if let Ok(info) = details::ResourceInfo::decode(data) {
                    self.resource = Some(Resource {
                        kind: info.resource_type,
                        name: info.resource_name,
                        description: info.description,
                    });
                }
            }
            _ => {}
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.code)?;
        if !self.reason.is_empty() {
            write!(f, " ({})", self.reason)?;
        }
        write!(f, ": {}", self.message)?;
        for (nth, each) in self.field_violations.iter().enumerate() {
            let before = if nth == 0 { " [" } else { "; " };
            write!(f, "{before}{}: {}", each.field, each.description)?;
        }
        f.write_str(if self.field_violations.is_empty() { "" } else { "]" })
    }
}

/// The policy said no; the denial says why. An answer, not a fault, so it is no [`Error`].
#[derive(Clone, Debug)]
pub struct Denied {
    /// The decision, with its denial.
    pub decision: Decision,
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(denial) = self.decision.denial() {
            write!(f, "{}: ", denial.reason)?;
        }
        f.write_str(&self.decision.message)
    }
}

impl StdError for Denied {}

/// Why there is no [`Call`](crate::Call): the policy said no, or nobody could be asked.
#[derive(Clone, Debug)]
pub enum RequestError {
    /// The policy said no. Whoever lets requests pass while the sidecar is down must not let this pass.
    Denied(Box<Denied>),
    /// The sidecar did not answer, or refused the call.
    Fault(Error),
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Denied(denied) => denied.fmt(f),
            Self::Fault(error) => error.fmt(f),
        }
    }
}

impl StdError for RequestError {}

impl From<Error> for RequestError {
    fn from(error: Error) -> Self {
        Self::Fault(error)
    }
}

/// The standard error details of `google.rpc`, as far as they are read.
mod details {
    use std::collections::BTreeMap;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ErrorInfo {
        #[prost(string, tag = "1")]
        pub(super) reason: String,
        #[prost(btree_map = "string, string", tag = "3")]
        pub(super) metadata: BTreeMap<String, String>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct FieldViolation {
        #[prost(string, tag = "1")]
        pub(super) field: String,
        #[prost(string, tag = "2")]
        pub(super) description: String,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct BadRequest {
        #[prost(message, repeated, tag = "1")]
        pub(super) field_violations: Vec<FieldViolation>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct RetryInfo {
        #[prost(message, optional, tag = "1")]
        pub(super) retry_delay: Option<prost_types::Duration>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ResourceInfo {
        #[prost(string, tag = "1")]
        pub(super) resource_type: String,
        #[prost(string, tag = "2")]
        pub(super) resource_name: String,
        #[prost(string, tag = "4")]
        pub(super) description: String,
    }
}
