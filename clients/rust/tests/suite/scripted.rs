//! A sidecar that answers as a test says, over real HTTP/2, and remembers what it was asked.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use keyturn::{Client, Options};
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::pb;

/// One call, as it arrived.
#[derive(Clone)]
pub struct Seen {
    /// The method, e.g. `Decide`.
    pub method: String,
    pub authority: String,
    pub headers: HeaderMap,
    body: Bytes,
}

impl Seen {
    pub fn message<M: Message + Default>(&self) -> M {
        M::decode(self.body.clone()).expect("a message of this method")
    }
}

/// What becomes of one call.
pub enum Reply {
    Answer(Vec<u8>),
    /// A status, with its details as the value of their header.
    Status {
        code: i32,
        message: &'static str,
        details: Option<String>,
    },
    /// A page that no sidecar made.
    Page(StatusCode),
    /// No answer at all.
    Silence,
    /// The answer without its end.
    CutOff,
    /// The stream is reset.
    Reset,
    /// The connection is closed.
    Close,
}

impl Reply {
    pub fn message(message: impl Message) -> Self {
        Self::Answer(message.encode_to_vec())
    }

    /// A status without details, as from the way to the sidecar.
    pub fn bare(code: i32) -> Self {
        Self::Status { code, message: "as scripted", details: None }
    }

    /// A status of a sidecar's own.
    pub fn status(code: i32, details: &[prost_types::Any]) -> Self {
        Self::Status { code, message: "as scripted", details: Some(details_header(code, details)) }
    }
}

/// UNAVAILABLE with this reason.
pub fn unavailable(reason: &str) -> Reply {
    Reply::status(14, &[error_info(reason)])
}

pub fn details_header(code: i32, details: &[prost_types::Any]) -> String {
    let status = pb::Status { code, message: "as scripted".into(), details: details.to_vec() };
    // The standard alphabet, unpadded, as every gRPC library takes it.
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in status.encode_to_vec().chunks(3) {
        let bits =
            three.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - three.len()));
        for place in 0..=three.len() {
            text.push(char::from(alphabet[(bits >> (18 - 6 * place) & 63) as usize]));
        }
    }
    text
}

pub fn any(name: &str, message: &impl Message) -> prost_types::Any {
    prost_types::Any { type_url: format!("type.googleapis.com/{name}"), value: message.encode_to_vec() }
}

pub fn error_info(reason: &str) -> prost_types::Any {
    any("google.rpc.ErrorInfo", &reason.to_string())
}

pub fn retry_info(wait: Duration) -> prost_types::Any {
    nested("google.rpc.RetryInfo", &prost_types::Duration::try_from(wait).unwrap())
}

/// A detail that is one message in its field 1: tag, length, bytes.
pub fn nested(name: &str, message: &impl Message) -> prost_types::Any {
    let inner = message.encode_to_vec();
    let mut value = vec![0x0a, u8::try_from(inner.len()).unwrap()];
    value.extend(inner);
    prost_types::Any { type_url: format!("type.googleapis.com/{name}"), value }
}

type Script = Arc<dyn Fn(&Seen, usize) -> Reply + Send + Sync>;

/// A running scripted sidecar. It ends when it is dropped.
pub struct Sidecar {
    pub target: String,
    seen: Arc<Mutex<Vec<Seen>>>,
    changed: Arc<Notify>,
    script: Script,
    serving: JoinHandle<()>,
    directory: Option<tempfile::TempDir>,
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Sidecar {
    /// On a Unix socket; `script` gets each call, and how many of its method came before it.
    pub fn new(script: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let target = format!("unix:{}", directory.path().join("k.sock").display());
        let mut sidecar = Self::at(target, Arc::new(script), None);
        sidecar.directory = Some(directory);
        sidecar
    }

    /// On loopback, with TLS where it is given.
    pub fn tcp(
        tls: Option<TlsAcceptor>,
        script: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::at("127.0.0.1:0".into(), Arc::new(script), tls)
    }

    fn at(target: String, script: Script, tls: Option<TlsAcceptor>) -> Self {
        let (seen, changed) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Notify::new()));
        let answering = Answering { script: script.clone(), seen: seen.clone(), changed: changed.clone() };
        let (target, serving) = match target.strip_prefix("unix:") {
            Some(path) => {
                let _ = std::fs::remove_file(path);
                let listener = UnixListener::bind(path).unwrap();
                (
                    target.clone(),
                    tokio::spawn(async move {
                        let mut connections = JoinSet::new();
                        while let Ok((socket, _)) = listener.accept().await {
                            connections.spawn(answering.clone().serve(socket));
                        }
                    }),
                )
            }
            None => {
                let listener = std::net::TcpListener::bind(&target).unwrap();
                listener.set_nonblocking(true).unwrap();
                let listener = TcpListener::from_std(listener).unwrap();
                (
                    listener.local_addr().unwrap().to_string(),
                    tokio::spawn(async move {
                        let mut connections = JoinSet::new();
                        while let Ok((socket, _)) = listener.accept().await {
                            let (answering, tls) = (answering.clone(), tls.clone());
                            connections.spawn(async move {
                                match tls {
                                    None => answering.serve(socket).await,
                                    Some(tls) => {
                                        if let Ok(socket) = tls.accept(socket).await {
                                            answering.serve(socket).await;
                                        }
                                    }
                                }
                            });
                        }
                    }),
                )
            }
        };
        Self { target, seen, changed, script, serving, directory: None }
    }

    /// Ends it with all its connections; nobody listens any more.
    pub async fn stop(&mut self) {
        self.serving.abort();
        let _ = (&mut self.serving).await;
    }

    /// Listens again, at the same place with the same script. What was seen stays.
    pub fn start(&mut self) {
        let mut again = Self::at(self.target.clone(), self.script.clone(), None);
        let before = std::mem::take(&mut *self.seen.lock().unwrap());
        again.seen.lock().unwrap().splice(0..0, before);
        again.directory = self.directory.take();
        *self = again;
    }

    pub fn options(&self) -> Options {
        Options { timeout: Duration::from_secs(30), ..Options::to(&self.target) }
    }

    pub fn client(&self) -> Client {
        Client::new(self.options()).unwrap()
    }

    /// The calls of a method so far.
    pub fn seen(&self, method: &str) -> Vec<Seen> {
        self.seen.lock().unwrap().iter().filter(|seen| seen.method == method).cloned().collect()
    }

    /// Waits until a method was called so often.
    pub async fn called(&self, method: &str, times: usize) -> Vec<Seen> {
        let reached = async {
            loop {
                let changed = self.changed.notified();
                let seen = self.seen(method);
                if seen.len() >= times {
                    return seen;
                }
                changed.await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), reached).await.expect("it was called in time")
    }

    /// All records that came, one by one or in batches.
    pub fn records(&self) -> Vec<pb::RecordRequest> {
        let mut records = Vec::new();
        for seen in self.seen.lock().unwrap().iter() {
            match seen.method.as_str() {
                "Record" => records.push(seen.message()),
                "BatchRecord" => records.extend(seen.message::<pb::BatchRecordRequest>().requests),
                _ => {}
            }
        }
        records
    }
}

#[derive(Clone)]
struct Answering {
    script: Script,
    seen: Arc<Mutex<Vec<Seen>>>,
    changed: Arc<Notify>,
}

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

impl Answering {
    async fn serve(self, socket: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let close = Arc::new(Notify::new());
        let service = service_fn({
            let close = close.clone();
            move |request| {
                let (this, close) = (self.clone(), close.clone());
                async move { Ok::<_, Infallible>(this.answer(request, &close).await) }
            }
        });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(socket), service);
        tokio::select! {
            _ = connection => {}
            () = close.notified() => {}
        }
    }

    async fn answer(&self, request: Request<Incoming>, close: &Notify) -> Response<Body> {
        let method = request.uri().path().rsplit('/').next().unwrap().to_string();
        let authority = request.uri().authority().map(ToString::to_string).unwrap_or_default();
        let headers = request.headers().clone();
        let mut body = request.into_body().collect().await.unwrap().to_bytes();
        body.advance(5);
        let seen = Seen { method, authority, headers, body };
        let before = {
            let mut all = self.seen.lock().unwrap();
            all.push(seen.clone());
            all.iter().filter(|each| each.method == seen.method).count() - 1
        };
        self.changed.notify_waiters();
        match (self.script)(&seen, before) {
            Reply::Answer(message) => {
                answered(vec![Ok(data(&message)), Ok(Frame::trailers(status(0, "", None)))])
            }
            Reply::Status { code, message, details } => {
                answered(vec![Ok(Frame::trailers(status(code, message, details)))])
            }
            Reply::Page(status) => {
                let mut page = answered(vec![Ok(Frame::data(Bytes::from_static(b"<html>")))]);
                *page.status_mut() = status;
                page.headers_mut().insert("content-type", HeaderValue::from_static("text/html"));
                page
            }
            Reply::Silence => std::future::pending().await,
            Reply::CutOff => answered(vec![Ok(Frame::data(Bytes::from_static(&[0, 0, 0])))]),
            Reply::Reset => answered(vec![Err(std::io::Error::other("reset"))]),
            Reply::Close => {
                close.notify_one();
                std::future::pending().await
            }
        }
    }
}

fn data(message: &[u8]) -> Frame<Bytes> {
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(message.len().try_into().unwrap());
    framed.put_slice(message);
    Frame::data(framed.freeze())
}

fn status(code: i32, message: &'static str, details: Option<String>) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", code.into());
    trailers.insert("grpc-message", HeaderValue::from_static(message));
    if let Some(details) = details {
        trailers.insert("grpc-status-details-bin", details.parse().unwrap());
    }
    trailers
}

fn answered(frames: Vec<Result<Frame<Bytes>, std::io::Error>>) -> Response<Body> {
    let mut response = Response::new(StreamBody::new(stream::iter(frames)).boxed_unsync());
    response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

// ------------------------------------------------------------------------------- answers

pub const SECRET: &str = "sk-canary-0123456789abcdefghijklmnop";
pub const HANDLE: &str = "kth1_canary-handle-0123456789abcdefghijklmnop";
pub const TICKET: &str = "ktt1_canary-ticket-0123456789abcdefghijklmnop";

pub fn key() -> pb::DecideResponse {
    pb::DecideResponse {
        decision_id: "d1".into(),
        mode: pb::Mode::ByokFirst.into(),
        reason: pb::Reason::ByokFirstOwnKey.into(),
        message: "Own keys come first.".into(),
        route: Some(pb::decide_response::Route::Key(pb::KeyHandle {
            handle: HANDLE.into(),
            key_id: "k1".into(),
            provider: "openai".into(),
            hint: "mnop".into(),
            secret: SECRET.into(),
            auth: Some(pb::key_handle::Auth { header: "Authorization".into(), prefix: "Bearer ".into() }),
            base_url: "https://api.openai.com/v1".into(),
            expire_time: Some(prost_types::Timestamp { seconds: 1_900_000_000, nanos: 0 }),
        })),
        ..Default::default()
    }
}

pub fn ticket() -> pb::DecideResponse {
    pb::DecideResponse {
        decision_id: "d2".into(),
        reason: pb::Reason::ByokFirstNoKey.into(),
        route: Some(pb::decide_response::Route::Ticket(pb::CreditTicket {
            ticket: TICKET.into(),
            hold_micros: 1_000,
            available_micros: 9_000,
            expire_time: None,
        })),
        ..Default::default()
    }
}

pub fn denial() -> pb::DecideResponse {
    pb::DecideResponse {
        reason: pb::Reason::Denied.into(),
        message: "Nobody pays.".into(),
        route: Some(pb::decide_response::Route::Denial(pb::Denial {
            reason: pb::DenialReason::HoldsInFlight.into(),
            retryable: true,
            retry_after: Some(prost_types::Duration { seconds: 3, nanos: 0 }),
            suggestion: "Wait.".into(),
        })),
        ..Default::default()
    }
}

pub fn taken() -> pb::RecordResponse {
    pb::RecordResponse { record_id: "d2".into(), charged_micros: 7, ..Default::default() }
}

/// Takes every record of a batch.
pub fn all_taken(seen: &Seen) -> Reply {
    each_taken(seen, |_| Ok(()))
}

/// Takes each record of a batch, or refuses it with a code.
pub fn each_taken(seen: &Seen, refuse: impl Fn(&pb::RecordRequest) -> Result<(), i32>) -> Reply {
    let records = seen.message::<pb::BatchRecordRequest>().requests;
    let results = records.into_iter().map(|record| {
        let result = match refuse(&record) {
            Ok(()) => pb::batch_record_result::Result::Response(taken()),
            Err(code) => pb::batch_record_result::Result::Status(pb::Status {
                code,
                message: "as scripted".into(),
                details: vec![error_info("SCRIPTED")],
            }),
        };
        pb::BatchRecordResult { result: Some(result) }
    });
    Reply::message(pb::BatchRecordResponse { results: results.collect() })
}

/// Decides with these answers in turn (the last one again and again), and takes every record.
pub fn deciding(answers: impl Into<Vec<pb::DecideResponse>>) -> impl Fn(&Seen, usize) -> Reply {
    let answers = answers.into();
    move |seen, before| match seen.method.as_str() {
        "Decide" => Reply::message(answers[before.min(answers.len() - 1)].clone()),
        "Record" => Reply::message(taken()),
        "BatchRecord" => all_taken(seen),
        _ => Reply::bare(12),
    }
}
