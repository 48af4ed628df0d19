//! The example gateway, as a program of its own.

use std::process::Stdio;
use std::time::Duration;

use http::StatusCode;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::task::JoinSet;

use crate::pb;
use crate::provider::{End, Provider, Said, program};
use crate::scripted::{HANDLE, Reply, SECRET, Sidecar, deciding, denial, key, ticket};

struct Gateway {
    address: String,
    process: Child,
}

/// An answer, and the connection that it comes by: dropping it hangs up.
struct Answer {
    status: StatusCode,
    headers: http::HeaderMap,
    body: Incoming,
    _connection: JoinSet<()>,
}

impl Answer {
    async fn json(mut self) -> Value {
        let body = (&mut self.body).collect().await.unwrap().to_bytes();
        serde_json::from_slice(&body).unwrap()
    }

    async fn chunk(&mut self) -> Option<Result<String, hyper::Error>> {
        let frame = self.body.frame().await?;
        Some(frame.map(|frame| String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap()))
    }
}

impl Gateway {
    async fn new(sidecar: &Sidecar, provider_url: &str) -> Self {
        let mut process = Command::new(program("examples/gateway"))
            .env("KEYTURN_ADDRESS", &sidecar.target)
            .env("OPENAI_API_KEY", "platform")
            .env("OPENAI_BASE_URL", provider_url)
            .env_remove("LISTEN")
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let line = lines.next_line().await.unwrap().unwrap();
        let address = line.strip_prefix("listening on http://").unwrap().to_string();
        Self { address, process }
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Answer {
        let socket = TcpStream::connect(&self.address).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(socket)).await.unwrap();
        let mut connections = JoinSet::new();
        connections.spawn(async move {
            let _ = connection.await; // it may be cut
        });
        let response = sender.send_request(request).await.unwrap();
        let (head, body) = response.into_parts();
        Answer { status: head.status, headers: head.headers, body, _connection: connections }
    }

    async fn chat(&self, body: Value) -> Answer {
        let request = Request::post("/v1/chat/completions")
            .header("authorization", "Bearer u1")
            .header("content-type", "application/json")
            .header("x-private", "stays here")
            .body(Full::from(body.to_string()));
        self.send(request.unwrap()).await
    }

    /// SIGTERM, and how it ends.
    async fn end(mut self) -> std::process::ExitStatus {
        let id = self.process.id().unwrap().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().await.unwrap().success());
        self.process.wait().await.unwrap()
    }
}

fn record(sidecar: &Sidecar) -> pb::RecordRequest {
    let mut records = sidecar.records();
    assert_eq!(records.len(), 1, "{records:?}");
    records.remove(0)
}

#[tokio::test]
async fn credits_pay_with_the_platforms_key_and_sigterm_flushes_the_record() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let provider = Provider::new(|_| Said::completion()).await;
    let gateway = Gateway::new(&sidecar, &provider.url).await;
    let body = json!({"model": "gpt-4o", "max_tokens": 9, "max_completion_tokens": 7});
    let answer = gateway.chat(body.clone()).await;
    assert_eq!(
        (answer.status, &answer.headers["content-type"]),
        (StatusCode::OK, &"application/json".parse().unwrap())
    );
    assert_eq!(answer.json().await["model"], "gpt-4o-2024");
    assert!(gateway.end().await.success());

    let asked: pb::DecideRequest = sidecar.seen("Decide")[0].message();
    let tokens = pb::TokenEstimate {
        input_tokens: i64::try_from(body.to_string().len() / 4).unwrap(),
        max_output_tokens: 7,
    };
    assert_eq!(asked.estimate, Some(pb::decide_request::Estimate::Tokens(tokens)));
    let words =
        (asked.user_id.as_str(), asked.provider.as_str(), asked.model.as_str(), asked.service_type.as_str());
    assert_eq!(words, ("u1", "openai", "gpt-4o", "gateway"));
    let (headers, sent) = provider.seen().remove(0);
    assert_eq!((&headers["authorization"], sent), (&"Bearer platform".parse().unwrap(), body));
    assert!(!headers.contains_key("x-private"));
    let record = record(&sidecar);
    assert_eq!((record.outcome(), record.model.as_str()), (pb::Outcome::Success, "gpt-4o-2024"));
    let usage = pb::Usage {
        input_tokens: 11,
        output_tokens: 5,
        cache_read_tokens: 3,
        cache_write_tokens: 0,
        total_tokens: Some(16),
    };
    assert_eq!(record.usage, Some(usage));
}

#[tokio::test]
async fn a_stream_goes_through_chunk_by_chunk() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let usage = r#"{"model":"m","usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
    let provider = Provider::new(move |_| Said::stream(&["{}", usage, "[DONE]"], End::Whole)).await;
    let gateway = Gateway::new(&sidecar, &provider.url).await;
    let mut answer = gateway.chat(json!({"stream": true, "stream_options": {"include_usage": false}})).await;
    assert_eq!(answer.headers["content-type"], "text/event-stream");
    let mut text = String::new();
    while let Some(chunk) = answer.chunk().await {
        text += &chunk.unwrap();
    }
    assert_eq!(text, format!("data: {{}}\n\ndata: {usage}\n\ndata: [DONE]\n\n"));
    assert_eq!(provider.seen()[0].1["stream_options"]["include_usage"], true);
    assert!(gateway.end().await.success());
    let record = record(&sidecar);
    assert_eq!((record.outcome(), record.usage.unwrap().output_tokens), (pb::Outcome::Success, 2));
}

#[tokio::test]
async fn a_stream_that_breaks_off_is_a_providers_error_with_the_usage_so_far() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let usage = r#"{"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
    let provider = Provider::new(move |_| Said::stream(&[usage], End::Breaks)).await;
    let gateway = Gateway::new(&sidecar, &provider.url).await;
    let mut answer = gateway.chat(json!({"stream": true})).await;
    let mut last = None;
    while let Some(chunk) = answer.chunk().await {
        last = Some(chunk);
    }
    assert!(last.unwrap().is_err());
    assert!(gateway.end().await.success());
    let record = record(&sidecar);
    assert_eq!((record.outcome(), record.usage.unwrap().output_tokens), (pb::Outcome::ProviderError, 2));
}

#[tokio::test]
async fn a_caller_that_hangs_up_ends_the_providers_request_too() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let provider = Provider::new(|_| Said::stream(&["{}"], End::Hangs)).await;
    let gateway = Gateway::new(&sidecar, &provider.url).await;
    let mut answer = gateway.chat(json!({"stream": true})).await;
    // The first chunk comes before the stream has ended.
    assert_eq!(answer.chunk().await.unwrap().unwrap(), "data: {}\n\n");
    drop(answer);
    tokio::time::timeout(Duration::from_secs(30), provider.given_up.notified()).await.unwrap();
    assert!(gateway.end().await.success());
    assert_eq!(record(&sidecar).outcome(), pb::Outcome::ClientCancelled);
}

#[tokio::test]
async fn a_caller_that_hangs_up_before_the_answer_ends_the_providers_request_too() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let provider = Provider::new(|_| Said { chunks: vec![], end: End::Hangs, ..Said::completion() }).await;
    let gateway = Gateway::new(&sidecar, &provider.url).await;
    tokio::select! {
        _ = gateway.chat(json!({})) => panic!("nobody answers"),
        () = provider.asked.notified() => {}
    }
    tokio::time::timeout(Duration::from_secs(30), provider.given_up.notified()).await.unwrap();
    assert!(gateway.end().await.success());
    assert_eq!(record(&sidecar).outcome(), pb::Outcome::ClientCancelled);
}

#[tokio::test]
async fn a_refused_key_is_recorded_and_the_next_credential_tried() {
    let provider = Provider::new(|headers| {
        if headers["authorization"] == "Bearer platform" {
            return Said::completion();
        }
        let error = json!({"error": {"message": "no such key", "code": "invalid_api_key"}});
        Said::json(StatusCode::UNAUTHORIZED, &error)
    })
    .await;
    let mut own = key();
    if let Some(pb::decide_response::Route::Key(key)) = &mut own.route {
        key.base_url.clone_from(&provider.url);
    }
    let sidecar = Sidecar::new(deciding([own.clone(), ticket()]));
    let gateway = Gateway::new(&sidecar, &provider.url).await;
    assert_eq!(gateway.chat(json!({})).await.status, StatusCode::OK);
    assert!(gateway.end().await.success());
    assert_eq!(provider.seen()[0].0["authorization"], format!("Bearer {SECRET}"));
    assert_eq!(sidecar.seen("Decide")[1].message::<pb::DecideRequest>().failed_key_handles, [HANDLE]);
    let records = sidecar.records();
    assert_eq!((records[0].outcome(), records[0].http_status), (pb::Outcome::AuthRejected, 401));
    assert_eq!(records[0].error_message, "no such key");
    assert_eq!(records[1].outcome(), pb::Outcome::Success);

    // Nobody else may pay: the provider's own answer goes back.
    let sidecar = Sidecar::new(deciding([own.clone(), denial()]));
    let gateway = Gateway::new(&sidecar, &provider.url).await;
    let answer = gateway.chat(json!({})).await;
    assert_eq!(answer.status, StatusCode::UNAUTHORIZED);
    assert_eq!(answer.json().await["error"]["code"], "invalid_api_key");
    assert!(gateway.end().await.success());

    // No more than three keys.
    let sidecar = Sidecar::new(deciding([own]));
    let gateway = Gateway::new(&sidecar, &provider.url).await;
    assert_eq!(gateway.chat(json!({})).await.status, StatusCode::UNAUTHORIZED);
    assert!(gateway.end().await.success());
    assert_eq!((sidecar.seen("Decide").len(), sidecar.records().len()), (3, 3));
}

#[tokio::test]
async fn what_the_provider_refuses_goes_back_as_it_is() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let provider = Provider::new(|_| {
        let limit = Said::json(StatusCode::TOO_MANY_REQUESTS, &json!({"error": {"type": "requests"}}));
        Said { retry_after: Some("20"), ..limit }
    })
    .await;
    let gateway = Gateway::new(&sidecar, &provider.url).await;
    assert_eq!(gateway.chat(json!({})).await.status, StatusCode::TOO_MANY_REQUESTS);
    assert!(gateway.end().await.success());
    let record = record(&sidecar);
    assert_eq!((record.outcome(), record.retry_after.unwrap().seconds), (pb::Outcome::RateLimited, 20));
}

#[tokio::test]
async fn its_own_errors_have_openais_form() {
    let mut sidecar = Sidecar::new(|seen, before| match before {
        0 => Reply::bare(5),
        1 => Reply::bare(7),
        2 => Reply::message(ticket()),
        _ => deciding([denial()])(seen, before),
    });
    let gateway = Gateway::new(&sidecar, "http://127.0.0.1:1/v1").await;
    let mut said = Vec::new();
    for _ in 0..4 {
        let answer = gateway.chat(json!({})).await;
        let (status, retry_after) = (answer.status.as_u16(), answer.headers.get("retry-after").cloned());
        let error = answer.json().await["error"].clone();
        assert_eq!(error["type"], "keyturn");
        said.push((status, error["code"].as_str().unwrap().to_string(), retry_after.is_some()));
    }
    sidecar.stop().await;
    let answer = gateway.chat(json!({})).await;
    said.push((answer.status.as_u16(), answer.json().await["error"]["code"].as_str().unwrap().into(), true));
    let nobody = Request::post("/v1/chat/completions").body(Full::from("{}")).unwrap();
    let answer = gateway.send(nobody).await;
    said.push((answer.status.as_u16(), answer.json().await["error"]["code"].as_str().unwrap().into(), false));
    let expected = [
        (401, "unknown_user", false),
        (500, "internal", false),
        (502, "provider_unreachable", false),
        (429, "holds_in_flight", true),
        (503, "sidecar_unavailable", true),
        (401, "unauthenticated", false),
    ];
    assert_eq!(said, expected.map(|(status, code, wait)| (status, code.to_string(), wait)));
    let health = gateway.send(Request::get("/healthz").body(Full::default()).unwrap()).await;
    assert_eq!(health.status, StatusCode::OK);
}
