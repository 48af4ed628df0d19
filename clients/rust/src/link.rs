//! One call from its first attempt to its answer, and whether the sidecar is down.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Request, Response, Status};

use crate::error::{Code, Error};
use crate::options::Options;
use crate::pb;
use crate::pb::routing_service_client::RoutingServiceClient;
use crate::retries::{Attempts, Retries};
use crate::secret::Secret;
use crate::transport::{self, Place, Transport};

/// Longer deadlines are as good as this one, and clocks can add it.
pub(crate) const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);

type Stub = RoutingServiceClient<Transport>;

/// A method of the sidecar, by the type of its request.
pub(crate) trait Method: Clone + Send + 'static {
    type Answer: Send;
    fn send(
        request: Request<Self>,
        stub: Stub,
    ) -> impl Future<Output = Result<Response<Self::Answer>, Status>> + Send;
}

macro_rules! methods {
    ($($request:ident $method:ident $answer:ident)*) => {$(
        impl Method for pb::$request {
            type Answer = pb::$answer;

            async fn send(request: Request<Self>, mut stub: Stub) -> Result<Response<pb::$answer>, Status> {
                stub.$method(request).await
            }
        }
    )*};
}

methods! {
    DecideRequest decide DecideResponse
    RecordRequest record RecordResponse
    RedeemRequest redeem RedeemResponse
    ExplainRequest explain ExplainResponse
    BatchDecideRequest batch_decide BatchDecideResponse
    BatchRecordRequest batch_record BatchRecordResponse
}

/// The way to one sidecar, shared by everything that calls it.
pub(crate) struct Link {
    place: Place,
    authorization: Option<MetadataValue<Ascii>>,
    retries: Retries,
    stub: Mutex<Option<Stub>>,
    runtime: OnceLock<Handle>,
    /// Nobody is there: from the end of a call that could not reach the sidecar until one is answered.
    down: AtomicBool,
}

impl Link {
    /// # Errors
    /// `Invalid`: the options do not go together, or the token is no token.
    pub(crate) fn new(place: Place, options: &Options) -> Result<Self, Error> {
        Ok(Self {
            place,
            authorization: options.token.as_ref().map(authorization).transpose()?,
            retries: options.retries,
            stub: Mutex::new(None),
            runtime: OnceLock::new(),
            down: AtomicBool::new(false),
        })
    }

    /// Where the work of this client runs: where its first call was made, else where we are.
    pub(crate) fn runtime(&self) -> Option<Handle> {
        self.runtime.get().cloned().or_else(|| Handle::try_current().ok())
    }

    /// Calls, and tries again what the retry policy says; `once`: never.
    pub(crate) async fn call<M: Method>(
        &self,
        request: M,
        timeout: Duration,
        once: bool,
    ) -> Result<M::Answer, Error> {
        let deadline = deadline_in(timeout)?;
        let most = if once || self.down.load(Ordering::Relaxed) { 1 } else { self.retries.attempts };
        let mut attempts = Attempts::new(self.retries, most, deadline);
        loop {
            let error = match self.attempt(request.clone(), deadline).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            let Some(wait) = attempts.wait_after(&error) else {
                if is_away(&error) {
                    self.down.store(true, Ordering::Relaxed);
                }
                return Err(error);
            };
            sleep(wait).await;
        }
    }

    /// Calls once, and notes that the sidecar is there when it answers.
    pub(crate) async fn attempt<M: Method>(&self, request: M, deadline: Instant) -> Result<M::Answer, Error> {
        let mut request = Request::new(request);
        request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        if let Some(authorization) = &self.authorization {
            request.metadata_mut().insert("authorization", authorization.clone());
        }
        let passed = || Error::new(Code::DeadlineExceeded, transport::PASSED);
        let Ok(answer) = timeout_at(deadline, M::send(request, self.stub())).await else {
            return Err(passed());
        };
        let status = match answer {
            Ok(answer) => {
                self.down.store(false, Ordering::Relaxed);
                return Ok(answer.into_inner());
            }
            Err(status) => status,
        };
        if transport::not_answered(&status) {
            // A sidecar that gives up at the deadline resets the stream.
            return Err(if Instant::now() >= deadline { passed() } else { Error::from_status(&status) });
        }
        let error = Error::from_status(&status);
        if !is_away(&error) {
            self.down.store(false, Ordering::Relaxed);
        }
        Err(error)
    }

    /// Gives the connection up. Calls that are under way end on it.
    pub(crate) fn disconnect(&self) {
        self.stub.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn stub(&self) -> Stub {
        let mut stub = self.stub.lock().unwrap_or_else(PoisonError::into_inner);
        let connect = || {
            self.runtime.get_or_init(Handle::current);
            RoutingServiceClient::new(self.place.connect())
        };
        stub.get_or_insert_with(connect).clone()
    }

    pub(crate) fn place(&self) -> &Place {
        &self.place
    }
}

/// # Errors
/// `Invalid`: a timeout of nothing.
fn deadline_in(timeout: Duration) -> Result<Instant, Error> {
    if timeout.is_zero() {
        return Err(Error::invalid("timeout is more than zero"));
    }
    Ok(Instant::now() + timeout.min(LONGEST))
}

/// Whether the way to the sidecar failed, rather than the sidecar.
fn is_away(error: &Error) -> bool {
    matches!(error, Error::Unavailable(fault) if fault.reason.is_empty())
}

fn authorization(token: &Secret) -> Result<MetadataValue<Ascii>, Error> {
    let token = token.reveal().trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Error::invalid("token is printable ASCII without spaces, and not empty"));
    }
    let mut value = MetadataValue::try_from(format!("Bearer {token}"))
        .map_err(|_| Error::invalid("token makes no header"))?;
    value.set_sensitive(true);
    Ok(value)
}
