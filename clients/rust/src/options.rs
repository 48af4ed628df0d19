//! How to reach the sidecar, and the defaults of calls.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::model::{DecideRequest, Unsent};
use crate::retries::Retries;
use crate::secret::Secret;

/// Asked when the sidecar is down: whether the request may go ahead all the same, on the platform's own
/// credential.
pub type WhenDown = Arc<dyn Fn(&DecideRequest, &Error) -> bool + Send + Sync>;

/// Told of each record that the background could not send.
pub type OnUnsent = Arc<dyn Fn(&Unsent) + Send + Sync>;

/// How to reach the sidecar, and the defaults of calls.
///
/// ```
/// # use keyturn::Options;
/// let options = Options { token: Some("t0ken".into()), ..Options::to("127.0.0.1:50051") };
/// ```
#[derive(Clone)]
pub struct Options {
    /// `unix:PATH` or `HOST:PORT`. Nothing: `KEYTURN_ADDRESS`, else the default socket.
    pub target: Option<String>,
    /// Sent with every call; surrounding white space is cut.
    pub token: Option<Secret>,
    /// The authorities that may vouch for the sidecar, PEM. Turns TLS on.
    pub root_certificates: Option<String>,
    /// The client's certificate, PEM; with `private_key`. Turns TLS on.
    pub certificate_chain: Option<String>,
    /// The key of the client's certificate, PEM.
    pub private_key: Option<Secret>,
    /// Turns TLS on, with the system's authorities where no others are given.
    pub tls: bool,
    /// The deadline of a call with all its retries: 2 s.
    pub timeout: Duration,
    /// The retry policy.
    pub retries: Retries,
    /// How many records may wait to be sent in the background: 10,000.
    pub queue_size: usize,
    /// How long [`Client::close`](crate::Client::close) goes on sending: 5 s.
    pub close_timeout: Duration,
    /// Told of each record that the background could not send. Nothing: a warning of `tracing`.
    pub on_unsent: Option<OnUnsent>,
    /// Asked when the sidecar is down. Nothing: no request goes ahead.
    pub when_down: Option<WhenDown>,
}

impl Options {
    /// The defaults, with this target.
    pub fn to(target: impl Into<String>) -> Self {
        Self { target: Some(target.into()), ..Self::default() }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            target: None,
            token: None,
            root_certificates: None,
            certificate_chain: None,
            private_key: None,
            tls: false,
            timeout: Duration::from_secs(2),
            retries: Retries::default(),
            queue_size: 10_000,
            close_timeout: Duration::from_secs(5),
            on_unsent: None,
            when_down: None,
        }
    }
}

/// Tokens and keys are not printed at all.
impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options")
            .field("target", &self.target)
            .field("tls", &self.tls)
            .field("timeout", &self.timeout)
            .field("retries", &self.retries)
            .field("queue_size", &self.queue_size)
            .field("close_timeout", &self.close_timeout)
            .finish_non_exhaustive()
    }
}
