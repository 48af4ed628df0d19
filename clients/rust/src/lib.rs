#![doc = include_str!("../README.md")]
#![deny(missing_docs, unsafe_code)]

mod address;
mod call;
mod client;
mod error;
mod link;
mod model;
mod options;
mod queue;
mod retries;
mod secret;
mod transport;
mod wire;
mod words;

/// The generated stubs. Their messages print secrets, so none of them leaves this crate.
#[allow(missing_docs, clippy::all)]
mod pb {
    tonic::include_proto!("keyturn.v1");
}

pub use call::{Call, Failure, Note};
pub use client::Client;
pub use error::{Code, Denied, Error, Fault, FieldViolation, RequestError, Resource};
pub use http::HeaderMap;
pub use model::{
    CreditTicket, DecideRequest, Decision, Denial, ExplainStep, Explanation, KeyHandle, RecordRequest,
    Recorded, Route, Settles, Unsent, Usage,
};
pub use options::{OnUnsent, Options, WhenDown};
pub use retries::Retries;
pub use secret::{SealedHandle, SealedTicket, Secret};
pub use words::{
    Constraint, CostSource, DenialReason, Durability, KeyState, Mode, Outcome, Reason, outcome_of,
};
