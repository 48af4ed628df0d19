//! The client.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::address::{Target, default_target};
use crate::call::Call;
use crate::error::{Error, RequestError};
use crate::link::{Link, Method};
use crate::model::{DecideRequest, Decision, Explanation, RecordRequest, Recorded, Route, Unsent};
use crate::options::{Options, WhenDown};
use crate::pb;
use crate::queue::{Deciding, Queue, answers};
use crate::secret::{SealedHandle, Secret};
use crate::transport::Place;
use crate::wire;
use crate::words::Outcome;

/// A connection to one sidecar: made once, shared by all tasks, closed at the end.
///
/// A clone is the same client. It may be made anywhere, connects at its first call, and belongs to the tokio
/// runtime of that call. Every call has a deadline ([`Options::timeout`], or that of
/// [`Client::with_timeout`]), and is ended by dropping its future.
///
/// When the last clone is dropped without [`Client::close`], what is queued is sent all the same, as long as
/// the runtime lives and the close timeout allows.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
    timeout: Duration,
}

struct Inner {
    link: Arc<Link>,
    queue: Arc<Queue>,
    when_down: Option<WhenDown>,
    closed: AtomicBool,
}

impl Client {
    /// A client with these options. Nothing connects before the first call.
    ///
    /// # Errors
    /// [`Error::Invalid`], by name of the option: plain text to another machine, TLS on a Unix socket, half a
    /// client certificate, an unusable token or certificate, a target that is none.
    pub fn new(options: Options) -> Result<Self, Error> {
        if options.retries.attempts == 0 {
            return Err(Error::invalid("retries: attempts is at least 1"));
        }
        if options.timeout.is_zero() {
            return Err(Error::invalid("timeout is more than zero"));
        }
        let target = match options.target.as_deref() {
            None | Some("") => default_target()?,
            Some(target) => target.into(),
        };
        let place = Place::new(Target::parse(&target)?, &options)?;
        let link = Arc::new(Link::new(place, &options)?);
        let queue = Queue::new(link.clone(), &options);
        let inner = Inner { link, queue, when_down: options.when_down, closed: AtomicBool::new(false) };
        Ok(Self { inner: Arc::new(inner), timeout: options.timeout })
    }

    /// The same client with another deadline for its calls and for those of its [`Call`]s.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { inner: self.inner.clone(), timeout }
    }

    /// Decides, and gives the request from there to its record.
    ///
    /// Dropping the future leaves no hold behind, as with [`Client::decide`].
    ///
    /// # Errors
    /// [`RequestError::Denied`] when the policy says no, [`RequestError::Fault`] when nobody could be asked.
    pub async fn request(&self, mut request: DecideRequest) -> Result<Call, RequestError> {
        let owned = name(&mut request);
        Call::begin(self.clone(), request, owned).await
    }

    /// Whose credential pays for a request? A denial is an answer.
    ///
    /// When the future is dropped and the request has no id of the caller's, the decision goes on in the
    /// background, and a hold that comes of it is released. With an id of the caller's the same request is
    /// expected again.
    ///
    /// # Errors
    /// `Unavailable` and `DeadlineExceeded` when the sidecar is down, unless [`Options::when_down`] lets the
    /// request pass: the decision is unmetered then.
    pub async fn decide(&self, mut request: DecideRequest) -> Result<Decision, Error> {
        let owned = name(&mut request);
        self.decide_as(&request, owned).await
    }

    /// What became of a request, once: the same record again gets the first answer.
    ///
    /// When the future is dropped, the record is carried on in the background.
    pub async fn record(&self, record: RecordRequest) -> Result<Recorded, Error> {
        self.require_open()?;
        let request = wire::record_request(&record);
        let mut carried = Carried { queue: &self.inner.queue, record: Some(record) };
        let answer = self.call(request).await;
        carried.record = None;
        answer.map(wire::recorded)
    }

    /// Puts a record into the queue of the background, and returns at once.
    ///
    /// # Errors
    /// The record, still the caller's: `QueueFull`, or `Closed`.
    pub fn record_later(&self, record: RecordRequest) -> Result<(), Box<Unsent>> {
        if self.inner.closed.load(Ordering::SeqCst) {
            return Err(Box::new(Unsent { record, error: Error::Closed }));
        }
        self.inner.queue.push(record)
    }

    /// The secret behind a key handle, once per handle. Never tried again: it may have been carried out.
    pub async fn redeem(&self, handle: &SealedHandle) -> Result<Secret, Error> {
        self.require_open()?;
        let request = pb::RedeemRequest { key_handle: handle.as_str().into() };
        let answer = self.inner.link.call(request, self.timeout, true).await?;
        Ok(Secret::new(answer.secret))
    }

    /// What would [`Client::decide`] answer now, and why? Places no hold, tells no secret.
    pub async fn explain(&self, request: DecideRequest) -> Result<Explanation, Error> {
        self.require_open()?;
        let decide = Some(wire::decide_request(&request)?);
        self.call(pb::ExplainRequest { decide }).await.map(wire::explanation)
    }

    /// Up to 500 decisions in one call: an answer or an error for each, in order.
    pub async fn decide_many(
        &self,
        requests: impl IntoIterator<Item = DecideRequest>,
    ) -> Result<Vec<Result<Decision, Error>>, Error> {
        self.require_open()?;
        let requests: Vec<_> =
            requests.into_iter().map(|request| wire::decide_request(&request)).collect::<Result<_, _>>()?;
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let asked = requests.len();
        answers(wire::decisions(self.call(pb::BatchDecideRequest { requests }).await?), asked)
    }

    /// Up to 500 records in one call: an answer or an error for each, in order.
    pub async fn record_many(
        &self,
        records: impl IntoIterator<Item = RecordRequest>,
    ) -> Result<Vec<Result<Recorded, Error>>, Error> {
        self.require_open()?;
        let requests: Vec<_> = records.into_iter().map(|record| wire::record_request(&record)).collect();
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let asked = requests.len();
        answers(wire::records(self.call(pb::BatchRecordRequest { requests }).await?), asked)
    }

    /// Waits until what is queued now is sent or unsent.
    pub async fn flush(&self) {
        self.inner.queue.flush().await;
    }

    /// Takes no more calls and records, goes on sending for up to the close timeout, and gives back the
    /// records that were left. Every call after it fails as [`Error::Closed`].
    pub async fn close(&self) -> Vec<Unsent> {
        self.inner.closed.store(true, Ordering::SeqCst);
        let left = self.inner.queue.close().await;
        self.inner.link.disconnect();
        left
    }

    /// Decides; `owned`: nobody but us knows the request id, so what is dropped is undone.
    pub(crate) async fn decide_as(&self, request: &DecideRequest, owned: bool) -> Result<Decision, Error> {
        self.require_open()?;
        let asked = wire::decide_request(request)?;
        let answer = if owned {
            self.decide_undoably(asked).await
        } else {
            self.call(asked).await.map(wire::decision)
        };
        match (answer, &self.inner.when_down) {
            (Err(error), Some(when_down)) if error.is_unavailable() && when_down(request, &error) => {
                Ok(Decision::pass())
            }
            (answer, _) => answer,
        }
    }

    /// Decides in a task of its own, which goes on when this future is dropped.
    async fn decide_undoably(&self, asked: pb::DecideRequest) -> Result<Decision, Error> {
        let (tell, told) = oneshot::channel();
        let (client, deciding) = (self.clone(), self.inner.queue.deciding());
        tokio::spawn(async move {
            let answer = client.call(asked).await;
            let unclaimed =
                |answer| Unclaimed { decision: Some(wire::decision(answer)), _deciding: deciding, client };
            drop(tell.send(answer.map(unclaimed)));
        });
        match told.await {
            Ok(answer) => answer.and_then(|mut unclaimed| unclaimed.decision.take().ok_or(Error::Closed)),
            Err(_) => Err(Error::Closed), // the runtime is going down
        }
    }

    pub(crate) fn record_or_report(&self, record: RecordRequest) {
        self.inner.queue.push_or_report(record);
    }

    async fn call<M: Method>(&self, request: M) -> Result<M::Answer, Error> {
        self.inner.link.call(request, self.timeout, false).await
    }

    fn require_open(&self) -> Result<(), Error> {
        if self.inner.closed.load(Ordering::SeqCst) { Err(Error::Closed) } else { Ok(()) }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("target", &self.inner.link.place().target)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.queue.abandon();
    }
}

/// Gives the request an id if it has none, and says whether it did.
fn name(request: &mut DecideRequest) -> bool {
    let unnamed = request.request_id.as_deref().unwrap_or_default().is_empty();
    if unnamed {
        request.request_id = Some(wire::new_request_id());
    }
    unnamed
}

/// A record in the foreground; dropped with its future, it goes on in the background.
struct Carried<'a> {
    queue: &'a Arc<Queue>,
    record: Option<RecordRequest>,
}

impl Drop for Carried<'_> {
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            self.queue.push_or_report(record);
        }
    }
}

/// A decision on its way to whoever asked. If that one is gone, its hold is released.
struct Unclaimed {
    decision: Option<Decision>,
    _deciding: Deciding,
    /// Keeps the queue open until here.
    client: Client,
}

impl Drop for Unclaimed {
    fn drop(&mut self) {
        if let Some(Decision { route: Route::Ticket(ticket), .. }) = &self.decision {
            self.client.record_or_report(RecordRequest::new(ticket, Outcome::NeverSent));
        }
    }
}
