//! Nothing logs a secret. A program of its own, since a process has one log.

use std::fmt::{Debug, Write as _};
use std::sync::{Arc, Mutex};

use keyturn::{Client, DecideRequest, Options};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::scripted::{HANDLE, Reply, SECRET, Sidecar, TICKET, deciding, each_taken, key, ticket};

#[allow(dead_code)]
#[path = "suite/scripted.rs"]
mod scripted;

#[allow(dead_code, clippy::all)]
mod pb {
    tonic::include_proto!("keyturn.v1");
}

const TOKEN: &str = "kta_canary-token-0123456789abcdef";

/// Everything that anything logs, at every level, in this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<String>>);

impl Visit for Log {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0.lock().unwrap(), " {field}={value:?}");
    }
}

impl Subscriber for Log {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        span.record(&mut self.clone());
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, values: &Record<'_>) {
        values.record(&mut self.clone());
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let _ =
            write!(self.0.lock().unwrap(), "\n{} {}", event.metadata().level(), event.metadata().target());
        event.record(&mut self.clone());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn nothing_logs_a_secret_at_any_level_and_unsent_records_are_told() {
    let log = Log::default();
    tracing::subscriber::set_global_default(log.clone()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let sidecar = Sidecar::new(|seen, before| match (seen.method.as_str(), before) {
            ("Decide", 0) => Reply::Reset,
            ("Decide", 1) => Reply::Close,
            ("BatchRecord", _) => each_taken(seen, |_| Err(9)),
            _ => deciding([key(), ticket(), ticket(), ticket()])(seen, before.saturating_sub(2)),
        });
        let client = Client::new(Options { token: Some(TOKEN.into()), ..sidecar.options() }).unwrap();
        for _ in 0..2 {
            drop(client.request(DecideRequest::new("u1", "openai")).await.unwrap());
        }
        client.flush().await;
        client.close().await;
    });
    drop(runtime);
    let log = log.0.lock().unwrap();
    // The transport does log here, so there was something to search.
    assert!(log.contains("h2") && log.contains("TRACE"), "{log}");
    assert!(log.contains("WARN keyturn"), "{log}");
    assert!(
        log.contains("outcome=NEVER_SENT") && log.contains("error=FAILED_PRECONDITION (SCRIPTED)"),
        "{log}"
    );
    for canary in [SECRET, HANDLE, TICKET, TOKEN] {
        // Also in the way that bytes print.
        let bytes = format!("{:?}", canary.as_bytes());
        for leak in [&canary[8..], bytes.trim_matches(['[', ']'])] {
            assert!(!log.contains(leak), "{leak} is in {log}");
        }
    }
}
