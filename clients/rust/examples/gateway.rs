//! A gateway for OpenAI's chat completions: the user's own key pays, or the platform's.
//!
//! `KEYTURN_ADDRESS`, `LISTEN` (127.0.0.1:0), `OPENAI_API_KEY` and `OPENAI_BASE_URL` say what it needs to know.
//! The bearer token of a caller is the user's id: put your own authentication there.

use std::convert::Infallible;
use std::env;
use std::error::Error as StdError;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use keyturn::{
    Call, Client, DecideRequest, Denied, Error, Failure, Note, Options, Outcome, RequestError, Usage,
    outcome_of,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

const LARGEST_BODY: usize = 32 * 1024 * 1024;
const LONGEST_LINE: usize = 1024 * 1024;
const PROVIDER_TIMEOUT: Duration = Duration::from_secs(60);
const DRAIN: Duration = Duration::from_secs(3);
const MOST_KEYS: usize = 3;

type BoxError = Box<dyn StdError + Send + Sync>;
type Answer = Response<UnsyncBoxBody<Bytes, BoxError>>;

struct Gateway {
    keyturn: Client,
    provider: reqwest::Client,
    platform: HeaderMap,
    platform_url: String,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    rustls::crypto::ring::default_provider().install_default().map_err(|_| "a TLS provider is installed")?;
    let mut authorization = HeaderValue::from_str(&format!("Bearer {}", env::var("OPENAI_API_KEY")?))?;
    authorization.set_sensitive(true);
    let gateway = Arc::new(Gateway {
        keyturn: Client::new(Options::default())?,
        // A redirect would take the key along.
        provider: reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).build()?,
        platform: HeaderMap::from_iter([(AUTHORIZATION, authorization)]),
        platform_url: env::var("OPENAI_BASE_URL").unwrap_or("https://api.openai.com/v1".into()),
    });

    let mut terminated = signal(SignalKind::terminate())?;
    let listener = TcpListener::bind(env::var("LISTEN").unwrap_or("127.0.0.1:0".into())).await?;
    println!("listening on http://{}", listener.local_addr()?);

    let (stop, stopping) = watch::channel(());
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                // Too many open files, or a caller that is gone already: later ones may do better.
                let Ok((socket, _)) = accepted else {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    continue;
                };
                connections.spawn(serve(gateway.clone(), TokioIo::new(socket), stopping.clone()));
            }
            Some(_) = connections.join_next() => {}
            _ = terminated.recv() => break,
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    drop((listener, stop));
    let drained = async { while connections.join_next().await.is_some() {} };
    if timeout(DRAIN, drained).await.is_err() {
        connections.shutdown().await;
    }
    for unsent in gateway.keyturn.close().await {
        eprintln!("{unsent}");
    }
    Ok(())
}

/// Serves a connection until its end; a request whose caller hangs up is dropped, and so ended everywhere.
async fn serve(
    gateway: Arc<Gateway>,
    socket: TokioIo<tokio::net::TcpStream>,
    mut stopping: watch::Receiver<()>,
) {
    let service = service_fn(move |request| {
        let gateway = gateway.clone();
        async move { Ok::<_, Infallible>(gateway.answer(request).await) }
    });
    let mut connection = pin!(hyper::server::conn::http1::Builder::new().serve_connection(socket, service));
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = stopping.changed() => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await; // a caller that went away is no news
}

impl Gateway {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        match (request.method(), request.uri().path()) {
            (&Method::POST, "/v1/chat/completions") => {
                self.chat(request).await.unwrap_or_else(|refused| refused.answer())
            }
            (&Method::GET, "/healthz") => answer(StatusCode::OK, None, Bytes::new()),
            _ => Refused::new(StatusCode::NOT_FOUND, "not_found", "There is nothing here.").answer(),
        }
    }

    async fn chat(&self, request: Request<Incoming>) -> Result<Answer, Refused> {
        let user = bearer(request.headers()).ok_or_else(|| {
            Refused::new(
                StatusCode::UNAUTHORIZED,
                "unauthenticated",
                "Send your user id as the bearer token.",
            )
        })?;
        let content_type = request.headers().get(CONTENT_TYPE).cloned();
        let invalid = |text| Refused::new(StatusCode::BAD_REQUEST, "invalid_request", text);
        let body = Limited::new(request.into_body(), LARGEST_BODY).collect().await;
        let body = body.map_err(|_| invalid("The body is too large, or was cut off."))?.to_bytes();
        let mut asked: Value =
            serde_json::from_slice(&body).map_err(|_| invalid("The body is not valid JSON."))?;
        if !asked.is_object() {
            return Err(invalid("The body is no JSON object."));
        }

        let most = asked["max_completion_tokens"].as_i64().or(asked["max_tokens"].as_i64());
        let mut call = self
            .keyturn
            .request(DecideRequest {
                model: asked["model"].as_str().unwrap_or_default().into(),
                service_type: "gateway".into(),
                max_output_tokens: most,
                input_tokens: most.and_then(|_| i64::try_from(body.len() / 4).ok()),
                ..DecideRequest::new(user, "openai")
            })
            .await?;

        let body = if asked["stream"] == true {
            if !asked["stream_options"].is_object() {
                asked["stream_options"] = json!({});
            }
            asked["stream_options"]["include_usage"] = true.into();
            Bytes::from(asked.to_string())
        } else {
            body
        };
        for tried in 1.. {
            let response = self.send(&mut call, content_type.as_ref(), body.clone()).await?;
            let status = response.status();
            call.note(Note { http_status: Some(status.as_u16()), ..Note::default() })?;
            if status.is_success() && is_stream(&response) {
                return Ok(streamed(call, response));
            }
            let content_type = response.headers().get(CONTENT_TYPE).cloned();
            let retry_after = seconds(response.headers());
            let body = whole(&mut call, response).await?;
            let said: Value = serde_json::from_slice(&body).unwrap_or_default();
            if status.is_success() {
                note(&mut call, &said)?;
                call.succeeded()?;
                return Ok(answer(status, content_type, body));
            }
            let error = &said["error"];
            let code = error["code"].as_str().or(error["type"].as_str());
            let outcome = outcome_of(status.as_u16(), code);
            let failure = Failure {
                http_status: Some(status.as_u16()),
                error_message: error["message"].as_str().unwrap_or_default().into(),
                retry_after,
            };
            let of_the_key = [Outcome::AuthRejected, Outcome::RateLimited, Outcome::ProviderBilling];
            if call.key().is_some() && of_the_key.contains(&outcome) && tried < MOST_KEYS {
                match call.key_refused(outcome, failure).await {
                    Ok(()) => continue,
                    // Nobody else may pay: what the provider said is the answer.
                    Err(RequestError::Denied(_)) => {}
                    Err(error) => return Err(error.into()),
                }
            } else {
                call.failed(outcome, failure)?;
            }
            return Ok(answer(status, content_type, body));
        }
        unreachable!("the last key's answer goes back")
    }

    /// Asks the provider, signed by whoever pays.
    async fn send(
        &self,
        call: &mut Call,
        content_type: Option<&HeaderValue>,
        body: Bytes,
    ) -> Result<reqwest::Response, Refused> {
        let base = call.key().map_or(&self.platform_url, |key| &key.base_url);
        let url = format!("{}/chat/completions", base.trim_end_matches('/'));
        let mut headers = call.headers(&self.platform)?;
        headers.extend(content_type.map(|value| (CONTENT_TYPE, value.clone())));
        match timeout(PROVIDER_TIMEOUT, self.provider.post(url).headers(headers).body(body).send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => {
                let unsent = error.is_connect() || error.is_builder();
                let outcome = if unsent { Outcome::NeverSent } else { Outcome::ProviderError };
                call.failed(outcome, Failure::default())?;
                Err(Refused::unreachable())
            }
            Err(_) => Err(timed_out(call)?),
        }
    }
}

/// The whole of an answer that is no stream.
async fn whole(call: &mut Call, response: reqwest::Response) -> Result<Bytes, Refused> {
    match timeout(PROVIDER_TIMEOUT, response.bytes()).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(_)) => {
            call.failed(Outcome::ProviderError, Failure::default())?;
            Err(Refused::unreachable())
        }
        Err(_) => Err(timed_out(call)?),
    }
}

fn timed_out(call: &mut Call) -> Result<Refused, Error> {
    call.failed(Outcome::Timeout, Failure::default())?;
    let text = "The provider did not answer in time.";
    Ok(Refused::new(StatusCode::GATEWAY_TIMEOUT, "provider_timeout", text))
}

fn is_stream(response: &reqwest::Response) -> bool {
    let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.is_some_and(|value| value.to_ascii_lowercase().starts_with("text/event-stream"))
}

/// An answer passed on as it arrives. It owns the call: whichever way it ends, the call ends with it.
struct Stream {
    call: Call,
    response: reqwest::Response,
    line: Vec<u8>,
    done: bool,
    ended: bool,
}

fn streamed(call: Call, response: reqwest::Response) -> Answer {
    let (status, content_type) = (response.status(), response.headers().get(CONTENT_TYPE).cloned());
    let stream = Stream { call, response, line: Vec::new(), done: false, ended: false };
    let frames = stream::unfold(stream, |mut stream| async move {
        let frame = stream.next().await?;
        Some((frame.map(Frame::data), stream))
    });
    with_type(status, content_type, StreamBody::new(frames).boxed_unsync())
}

impl Stream {
    async fn next(&mut self) -> Option<Result<Bytes, BoxError>> {
        if self.ended {
            return None;
        }
        let chunk = match timeout(PROVIDER_TIMEOUT, self.response.chunk()).await {
            Ok(Ok(Some(chunk))) => self.read(&chunk).map(|()| Some(chunk)),
            Ok(Ok(None)) if self.done => Ok(None),
            Ok(_) => self.broken(Outcome::ProviderError),
            Err(_) => self.broken(Outcome::Timeout),
        };
        self.ended = !matches!(chunk, Ok(Some(_)));
        if chunk.is_err() {
            tokio::task::yield_now().await; // what came before goes out before the connection is cut
        }
        chunk.transpose()
    }

    fn broken(&mut self, outcome: Outcome) -> Result<Option<Bytes>, BoxError> {
        if !self.done {
            self.call.failed(outcome, Failure::default())?;
        }
        Err("the provider's stream broke off".into())
    }

    /// Notes what the events say: the usage, the model, and that all has been said.
    fn read(&mut self, chunk: &[u8]) -> Result<(), BoxError> {
        for part in chunk.split_inclusive(|byte| *byte == b'\n') {
            self.line
                .extend_from_slice(&part[..part.len().min(LONGEST_LINE.saturating_sub(self.line.len()))]);
            if !part.ends_with(b"\n") {
                break;
            }
            let line = std::mem::take(&mut self.line);
            let Some(event) = line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) else { continue };
            if event == b"[DONE]" {
                self.done = true;
                self.call.succeeded()?;
            } else if let Ok(said) = serde_json::from_slice(event) {
                note(&mut self.call, &said)?;
            }
        }
        Ok(())
    }
}

/// Notes the usage and the model of an answer, or of one event of it.
fn note(call: &mut Call, said: &Value) -> Result<(), Error> {
    if let Some(model) = said["model"].as_str() {
        call.note(Note { model: Some(model.into()), ..Note::default() })?;
    }
    let usage = &said["usage"];
    if !usage.is_object() {
        return Ok(());
    }
    call.used(Usage {
        input_tokens: usage["prompt_tokens"].as_i64(),
        output_tokens: usage["completion_tokens"].as_i64(),
        total_tokens: usage["total_tokens"].as_i64(),
        cache_read_tokens: usage["prompt_tokens_details"]["cached_tokens"].as_i64(),
        ..Usage::default()
    })
}

fn bearer(headers: &HeaderMap) -> Option<String> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then(|| token.into())
}

fn seconds(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

/// An answer of the gateway's own, in OpenAI's form.
struct Refused {
    status: StatusCode,
    code: String,
    message: String,
    retry_after: Option<Duration>,
}

impl Refused {
    fn new(status: StatusCode, code: impl Into<String>, message: impl Into<String>) -> Self {
        Self { status, code: code.into(), message: message.into(), retry_after: None }
    }

    fn unreachable() -> Self {
        Self::new(StatusCode::BAD_GATEWAY, "provider_unreachable", "The provider cannot be reached.")
    }

    fn answer(self) -> Answer {
        let error = json!({"error": {"message": self.message, "type": "keyturn", "code": self.code}});
        let json = HeaderValue::from_static("application/json");
        let mut answer = answer(self.status, Some(json), Bytes::from(error.to_string()));
        if let Some(wait) = self.retry_after {
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            answer.headers_mut().insert(RETRY_AFTER, seconds.max(1).into());
        }
        answer
    }
}

impl From<RequestError> for Refused {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Denied(denied) => Self::from(*denied),
            RequestError::Fault(error) => Self::from(error),
        }
    }
}

impl From<Denied> for Refused {
    fn from(denied: Denied) -> Self {
        let Some(denial) = denied.decision.denial() else {
            return Self::new(StatusCode::PAYMENT_REQUIRED, "denied", denied.to_string());
        };
        let code = denial.reason.to_string().to_lowercase();
        let message = format!("{} {}", denied.decision.message, denial.suggestion);
        if denial.retryable {
            let retry_after = denial.retry_after.or(Some(Duration::from_secs(1)));
            return Self { retry_after, ..Self::new(StatusCode::TOO_MANY_REQUESTS, code, message) };
        }
        Self::new(StatusCode::PAYMENT_REQUIRED, code, message)
    }
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        if error.is_unavailable() {
            let text = "It is not known who pays for this request: try again.";
            let refused = Self::new(StatusCode::SERVICE_UNAVAILABLE, "sidecar_unavailable", text);
            return Self { retry_after: Some(Duration::from_secs(1)), ..refused };
        }
        if let Error::NotFound(fault) = &error {
            return Self::new(StatusCode::UNAUTHORIZED, "unknown_user", fault.message.clone());
        }
        eprintln!("{error}");
        let code = if error.reason().is_empty() { "internal" } else { error.reason() };
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, code.to_lowercase(), "Something went wrong here.")
    }
}

fn answer(status: StatusCode, content_type: Option<HeaderValue>, body: Bytes) -> Answer {
    with_type(status, content_type, Full::new(body).map_err(|never| match never {}).boxed_unsync())
}

fn with_type(
    status: StatusCode,
    content_type: Option<HeaderValue>,
    body: UnsyncBoxBody<Bytes, BoxError>,
) -> Answer {
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    answer.headers_mut().extend(content_type.map(|value| (CONTENT_TYPE, value)));
    answer
}
