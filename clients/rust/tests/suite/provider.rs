//! A provider over real HTTP, and the programs that are made to talk to it.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};

/// A program that `make build` made.
pub fn program(name: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(|deps| deps.parent()).unwrap().join(name);
    assert!(path.exists(), "{} is missing: `make build` makes it", path.display());
    path
}

/// What the provider answers.
pub struct Said {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub retry_after: Option<&'static str>,
    pub chunks: Vec<String>,
    pub end: End,
}

pub enum End {
    Whole,
    /// Nothing more, ever.
    Hangs,
    /// The connection breaks.
    Breaks,
}

impl Said {
    pub fn json(status: StatusCode, body: &Value) -> Self {
        let chunks = vec![body.to_string()];
        Self { status, content_type: "application/json", retry_after: None, chunks, end: End::Whole }
    }

    /// A completion with its usage.
    pub fn completion() -> Self {
        let usage = json!({
            "prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16,
            "prompt_tokens_details": {"cached_tokens": 3},
        });
        Self::json(StatusCode::OK, &json!({"model": "gpt-4o-2024", "choices": [], "usage": usage}))
    }

    pub fn stream(events: &[&str], end: End) -> Self {
        let chunks = events.iter().map(|event| format!("data: {event}\n\n")).collect();
        Self { status: StatusCode::OK, content_type: "text/event-stream", retry_after: None, chunks, end }
    }
}

pub struct Provider {
    pub url: String,
    seen: Arc<Mutex<Vec<(HeaderMap, Value)>>>,
    /// A request came.
    pub asked: Arc<Notify>,
    /// An answer was given up by whoever asked.
    pub given_up: Arc<Notify>,
    serving: JoinHandle<()>,
}

impl Drop for Provider {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

struct GivenUp(Arc<Notify>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Provider {
    pub async fn new(script: impl Fn(&HeaderMap) -> Said + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (asked, given_up) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let came = asked.clone();
        let (script, noted, dropped) = (Arc::new(script), seen.clone(), given_up.clone());
        let serving = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let all = (script.clone(), noted.clone(), dropped.clone(), came.clone());
                let service = service_fn(move |request: Request<Incoming>| {
                    let (script, noted, dropped, came) = all.clone();
                    async move {
                        assert_eq!(request.uri().path(), "/v1/chat/completions");
                        let headers = request.headers().clone();
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        noted.lock().unwrap().push((headers.clone(), serde_json::from_slice(&body).unwrap()));
                        came.notify_one();
                        Ok::<_, Infallible>(answered(script(&headers), dropped))
                    }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(socket), service);
                connections.spawn(async move {
                    let _ = connection.await; // whoever asked may hang up
                });
            }
        });
        Self { url, seen, asked, given_up, serving }
    }

    pub fn seen(&self) -> Vec<(HeaderMap, Value)> {
        self.seen.lock().unwrap().clone()
    }
}

type Body = http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>;

fn answered(said: Said, dropped: Arc<Notify>) -> Response<Body> {
    let end = match said.end {
        End::Whole => stream::empty().boxed(),
        End::Breaks => stream::once(async {
            tokio::task::yield_now().await; // what was said before is sent before
            Err(std::io::Error::other("broken"))
        })
        .boxed(),
        End::Hangs => {
            let given_up = GivenUp(dropped);
            let forever = async move {
                let _given_up = given_up;
                std::future::pending().await
            };
            stream::once(forever).boxed()
        }
    };
    let chunks = said.chunks.into_iter().map(|chunk| Ok(Frame::data(Bytes::from(chunk))));
    let mut response = Response::new(StreamBody::new(stream::iter(chunks).chain(end)).boxed_unsync());
    *response.status_mut() = said.status;
    response.headers_mut().insert("content-type", HeaderValue::from_static(said.content_type));
    if let Some(seconds) = said.retry_after {
        response.headers_mut().insert("retry-after", HeaderValue::from_static(seconds));
    }
    response
}
