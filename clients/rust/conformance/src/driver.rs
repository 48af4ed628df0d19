//! The conformance driver: what it is told on standard input, done with the Rust client.
//!
//! The protocol is clients/conformance/README.md.

mod json;

use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use keyturn::{Call, Client, Decision, Error, RecordRequest, RequestError, SealedHandle, Secret, Unsent};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

/// A command that this driver can't carry out, as against one that the client refused.
type Defect = String;

/// What the client raised.
enum Raised {
    Fault(Error),
    Denied(Box<keyturn::Denied>),
    Unsent(Box<Unsent>),
    Cancelled,
}

impl From<Error> for Raised {
    fn from(error: Error) -> Self {
        Self::Fault(error)
    }
}

impl From<RequestError> for Raised {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Denied(denied) => Self::Denied(denied),
            RequestError::Fault(error) => Self::Fault(error),
        }
    }
}

impl From<Box<Unsent>> for Raised {
    fn from(unsent: Box<Unsent>) -> Self {
        Self::Unsent(unsent)
    }
}

struct Opened {
    client: Client,
    unsent: Arc<Mutex<Vec<Value>>>,
    asked: Arc<Mutex<Vec<Value>>>,
}

/// What `as` keeps: how it prints, its secret, and its decision.
#[derive(Default)]
struct Kept {
    prints: Vec<String>,
    secret: Option<Secret>,
    decision: Option<Decision>,
}

fn prints(value: &impl Debug) -> Vec<String> {
    vec![format!("{value:?}"), format!("{value:#?}")]
}

#[derive(Default)]
struct Driver {
    clients: Mutex<HashMap<String, Arc<Opened>>>,
    calls: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<Call>>>>>,
    kept: Mutex<HashMap<String, Kept>>,
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    tracing::subscriber::set_global_default(json::StandardError).expect("nobody else has set one");
    let driver = Arc::new(Driver::default());
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut out = tokio::io::stdout();
    while let Some(line) = lines.next_line().await? {
        let answer = match serde_json::from_str(&line) {
            Ok(command) => driver.clone().answer(command).await,
            Err(error) => json!({"defect": error.to_string()}),
        };
        out.write_all(format!("{answer}\n").as_bytes()).await?;
        out.flush().await?;
    }
    Ok(())
}

impl Driver {
    async fn answer(self: Arc<Self>, command: Value) -> Value {
        if command["op"] != "parallel" {
            return self.one(&command).await;
        }
        let commands = command["commands"].as_array().cloned().unwrap_or_default();
        let running: Vec<_> = commands
            .into_iter()
            .map(|command| {
                let driver = self.clone();
                tokio::spawn(async move { driver.one(&command).await })
            })
            .collect();
        let mut answers = Vec::new();
        for each in running {
            answers.push(each.await.unwrap_or_else(|error| json!({"defect": error.to_string()})));
        }
        json!({"ok": answers})
    }

    async fn one(&self, command: &Value) -> Value {
        let carried_out = async {
            match json::millis(command, "cancel_after_ms") {
                None => self.carry_out(command).await,
                Some(patience) => match tokio::time::timeout(patience, self.carry_out(command)).await {
                    Ok(answer) => answer,
                    Err(_) => Ok(Err(Raised::Cancelled)),
                },
            }
        };
        match carried_out.await {
            Ok(Ok(answer)) => json!({"ok": answer}),
            Ok(Err(raised)) => {
                self.keep(command, || match &raised {
                    Raised::Fault(error) => {
                        Kept { prints: [prints(error), vec![error.to_string()]].concat(), ..Kept::default() }
                    }
                    Raised::Denied(denied) => Kept {
                        prints: [prints(denied), vec![denied.to_string()]].concat(),
                        decision: Some(denied.decision.clone()),
                        ..Kept::default()
                    },
                    Raised::Unsent(unsent) => Kept {
                        prints: [prints(unsent), vec![unsent.to_string()]].concat(),
                        ..Kept::default()
                    },
                    Raised::Cancelled => Kept::default(),
                });
                json!({"error": raised_json(&raised)})
            }
            Err(defect) => json!({"defect": defect}),
        }
    }

    fn keep(&self, command: &Value, kept: impl FnOnce() -> Kept) {
        if let Some(name) = command["as"].as_str() {
            self.kept.lock().unwrap().insert(name.into(), kept());
        }
    }

    fn opened(&self, command: &Value) -> Result<Arc<Opened>, Defect> {
        let name = json::text(command, "client")?;
        self.clients.lock().unwrap().get(&name).cloned().ok_or_else(|| format!("no client {name}"))
    }

    fn client(&self, command: &Value) -> Result<Client, Defect> {
        let client = &self.opened(command)?.client;
        Ok(match json::millis(command, "timeout_ms") {
            Some(timeout) => client.with_timeout(timeout),
            None => client.clone(),
        })
    }

    fn call(&self, command: &Value) -> Result<Arc<tokio::sync::Mutex<Option<Call>>>, Defect> {
        let name = json::text(command, "call")?;
        self.calls.lock().unwrap().get(&name).cloned().ok_or_else(|| format!("no call {name}"))
    }

    fn record(&self, record: &Value) -> Result<Result<RecordRequest, Error>, Defect> {
        let decision = match record["decision"].as_str() {
            None => None,
            Some(name) => {
                let kept = self.kept.lock().unwrap();
                let decision = kept.get(name).and_then(|kept| kept.decision.clone());
                Some(decision.ok_or_else(|| format!("no decision {name}"))?)
            }
        };
        json::record(record, decision.as_ref())
    }

    async fn carry_out(&self, command: &Value) -> Result<Result<Value, Raised>, Defect> {
        // The client's own errors are answers; `?` is for what is wrong with the command.
        macro_rules! answer {
            ($result:expr) => {
                match $result {
                    Ok(answer) => answer,
                    Err(error) => return Ok(Err(error.into())),
                }
            };
        }
        Ok(Ok(match json::text(command, "op")?.as_str() {
            "open" => {
                answer!(self.open(command)?);
                json!({})
            }
            "close" => {
                let left = self.client(command)?.close().await;
                json!({"unsent": left.iter().map(json::unsent).collect::<Vec<_>>()})
            }
            "decide" => {
                let request = json::request(&command["request"])?;
                let decision = answer!(self.client(command)?.decide(request).await);
                self.keep_decision(command, &decision);
                json::decision(&decision, None)
            }
            "decide_many" => {
                let requests: Vec<_> =
                    json::list(command, "requests")?.iter().map(json::request).collect::<Result<_, _>>()?;
                items(answer!(self.client(command)?.decide_many(requests).await), |decision| {
                    json::decision(decision, None)
                })
            }
            "explain" => {
                let request = json::request(&command["request"])?;
                json::explanation(&answer!(self.client(command)?.explain(request).await))
            }
            "record" => {
                let record = answer!(self.record(&command["record"])?);
                json::recorded(&answer!(self.client(command)?.record(record).await))
            }
            "record_many" => {
                let mut records = Vec::new();
                for record in json::list(command, "records")? {
                    records.push(answer!(self.record(record)?));
                }
                items(answer!(self.client(command)?.record_many(records).await), json::recorded)
            }
            "record_later" => {
                let record = answer!(self.record(&command["record"])?);
                answer!(self.client(command)?.record_later(record));
                json!({})
            }
            "flush" => {
                self.client(command)?.flush().await;
                json!({})
            }
            "unsent" => json!(*self.opened(command)?.unsent.lock().unwrap()),
            "when_down_asked" => json!(*self.opened(command)?.asked.lock().unwrap()),
            "redeem" => {
                let handle = SealedHandle::new(json::text(command, "handle")?);
                let secret = answer!(self.client(command)?.redeem(&handle).await);
                self.keep(command, || Kept {
                    prints: prints(&secret),
                    secret: Some(secret.clone()),
                    decision: None,
                });
                json!({"secret": secret.reveal()})
            }
            "begin" => {
                let request = json::request(&command["request"])?;
                let call = answer!(self.client(command)?.request(request).await);
                let decision = json::decision(call.decision(), Some(call.request_id()));
                self.keep_call(command["as"].as_str(), &call);
                let name = json::text(command, "as")?;
                self.calls.lock().unwrap().insert(name, Arc::new(tokio::sync::Mutex::new(Some(call))));
                decision
            }
            "outcome_of" => {
                let status = u16::try_from(command["status"].as_i64().unwrap_or(0)).unwrap_or(0);
                json!({"outcome": keyturn::outcome_of(status, command["error_code"].as_str()).to_string()})
            }
            "show" => self.show(command)?,
            _ if command["call"].is_string() => {
                let shared = self.call(command)?;
                let mut call = shared.lock().await;
                if command["op"] == "end" {
                    call.take();
                    return Ok(Ok(json!({})));
                }
                // A call that was dropped is no more; only what it was can still be shown.
                let Some(call) = call.as_mut() else {
                    return Ok(Err(Error::Invalid("this call has ended".into()).into()));
                };
                answer!(self.with_call(call, command).await?)
            }
            op => return Err(format!("no op {op}")),
        }))
    }

    async fn with_call(&self, call: &mut Call, command: &Value) -> Result<Result<Value, Raised>, Defect> {
        if let Some(timeout) = json::millis(command, "timeout_ms") {
            call.set_timeout(timeout);
        }
        let done = |result: Result<(), Error>| result.map(|()| json!({})).map_err(Raised::from);
        Ok(match json::text(command, "op")?.as_str() {
            "headers" => {
                let platform = &command["platform"];
                let headers = call.headers(&json::headers(platform)?).map_err(Raised::from);
                let of_platform = platform.as_object().into_iter().flat_map(|given| given.keys());
                let of_key = call.key().map(|key| key.auth_header.as_str());
                headers.map(|found| {
                    json::from_headers(&found, of_key.into_iter().chain(of_platform.map(String::as_str)))
                })
            }
            "sending" => done(call.sending()),
            "succeeded" => done(call.succeeded()),
            "used" => done(call.used(json::usage(&command["usage"]))),
            "cost" => done(call.cost(command["micros"].as_i64().ok_or("micros is a number")?)),
            "note" => done(call.note(json::note(command)?)),
            "failed" => done(call.failed(json::outcome(&command["outcome"])?, json::failure(command)?)),
            "key_refused" => {
                let (outcome, failure) = json::refusal(command)?;
                let refused = call.key_refused(outcome, failure).await;
                self.keep_call(command["call"].as_str(), call);
                match refused {
                    Ok(()) => {
                        self.keep_decision(command, call.decision());
                        Ok(json::decision(call.decision(), Some(call.request_id())))
                    }
                    Err(error) => Err(error.into()),
                }
            }
            "finish" => match call.finish().await {
                Ok(recorded) => Ok(recorded.as_ref().map_or(Value::Null, json::recorded)),
                Err(error) => Err(error.into()),
            },
            op => return Err(format!("no op {op}")),
        })
    }

    fn open(&self, command: &Value) -> Result<Result<(), Error>, Defect> {
        let given = &command["options"];
        let unsent = Arc::new(Mutex::new(Vec::new()));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let mut options = json::options(given)?;
        let told = unsent.clone();
        options.on_unsent =
            Some(Arc::new(move |each: &Unsent| told.lock().unwrap().push(json::unsent(each))));
        if let Some(answer) = given["when_down"].as_str() {
            let (told, pass) = (asked.clone(), answer == "pass");
            options.when_down = Some(Arc::new(move |request, error| {
                let code = error.code().map(|code| code.to_string());
                told.lock().unwrap().push(json!({"user_id": request.user_id, "code": code}));
                pass
            }));
        }
        let name = json::text(command, "client")?;
        let printed = prints(&options);
        Ok(Client::new(options).map(|client| {
            self.kept.lock().unwrap().insert(
                name.clone(),
                Kept { prints: [prints(&client), printed].concat(), ..Kept::default() },
            );
            self.clients.lock().unwrap().insert(name, Arc::new(Opened { client, unsent, asked }));
        }))
    }

    fn keep_decision(&self, command: &Value, decision: &Decision) {
        self.keep(command, || Kept {
            prints: [prints(decision), prints(&decision.key()), prints(&decision.ticket())].concat(),
            secret: decision.key().and_then(|key| key.secret.clone()),
            decision: Some(decision.clone()),
        });
    }

    fn keep_call(&self, name: Option<&str>, call: &Call) {
        if let Some(name) = name {
            let kept = Kept {
                prints: [prints(call), prints(&call.key()), prints(&call.ticket())].concat(),
                secret: call.key().and_then(|key| key.secret.clone()),
                decision: Some(call.decision().clone()),
            };
            self.kept.lock().unwrap().insert(name.into(), kept);
        }
    }

    fn show(&self, command: &Value) -> Result<Value, Defect> {
        let name = json::text(command, "of")?;
        let kept = self.kept.lock().unwrap();
        let shown = kept.get(&name).ok_or_else(|| format!("nothing is kept as {name}"))?;
        let given = command["secret"].as_str();
        let revealed = shown.secret.as_ref().is_some_and(|secret| Some(secret.reveal()) == given);
        Ok(json!({"prints": shown.prints, "revealed": revealed}))
    }
}

fn items<T>(results: Vec<Result<T, Error>>, to_json: impl Fn(&T) -> Value) -> Value {
    let item = |result: &Result<T, Error>| match result {
        Ok(answer) => json!({"ok": to_json(answer)}),
        Err(error) => json!({"error": json::error(error)}),
    };
    results.iter().map(item).collect()
}

fn raised_json(raised: &Raised) -> Value {
    match raised {
        Raised::Fault(error) => json::error(error),
        Raised::Unsent(unsent) => json::error(&unsent.error),
        Raised::Denied(denied) => {
            let decision = json::decision(&denied.decision, None);
            json!({"kind": "Denied", "text": denied.to_string(), "decision": decision})
        }
        Raised::Cancelled => json!({"kind": "Cancelled", "text": "the future was dropped"}),
    }
}
