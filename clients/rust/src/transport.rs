//! The connection: TLS, sockets, and what counts as a failure of the way to the sidecar.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Request, Response, StatusCode, Uri};
use http_body::Frame;
use hyper_util::rt::TokioIo;
use tonic::Status;
use tonic::body::Body;
use tonic::metadata::MetadataMap;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tower::Service;

use crate::address::Target;
use crate::error::Error;
use crate::options::Options;

const USER_AGENT: &str = concat!("keyturn-rust/", env!("CARGO_PKG_VERSION"));
const GRPC: &[u8] = b"application/grpc";
const DETAILS: &str = "grpc-status-details-bin";

/// How long a connection may take to be made; what takes longer is begun anew.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// A place to connect to, checked.
#[derive(Clone)]
pub(crate) struct Place {
    pub(crate) target: Target,
    endpoint: Endpoint,
}

impl Place {
    /// # Errors
    /// `Invalid`: what the options say does not go together.
    pub(crate) fn new(target: Target, options: &Options) -> Result<Self, Error> {
        let tls = tls(options)?;
        let scheme = match (&target, &tls) {
            (Target::Unix(_), Some(_)) => {
                return Err(Error::invalid("tls: a Unix socket does not speak TLS"));
            }
            (_, Some(_)) => "https",
            (target, None) if !target.is_local() => {
                return Err(Error::invalid(
                    "tls: the target is another machine; give tls or root_certificates, so that keys and \
                     tokens do not cross the network in plain text",
                ));
            }
            _ => "http",
        };
        let unusable = |_| Error::invalid("target: it makes no address");
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", target.authority()))
            .and_then(|endpoint| endpoint.user_agent(USER_AGENT))
            .map_err(unusable)?
            .connect_timeout(CONNECT_TIMEOUT);
        if let (Some(tls), Target::Tcp { host, .. }) = (tls, &target) {
            // The library's own error could quote the key.
            endpoint = endpoint.tls_config(tls.domain_name(host)).map_err(|_| {
                Error::invalid(
                    "root_certificates, certificate_chain or private_key is not usable: they are PEM, and \
                     key and certificate belong together; with tls alone the system needs authorities",
                )
            })?;
        }
        if !target.is_local() {
            // A peer that vanished without a word is noticed by pings, not by TCP after minutes.
            endpoint = endpoint
                .http2_keep_alive_interval(Duration::from_secs(30))
                .keep_alive_timeout(Duration::from_secs(5))
                .keep_alive_while_idle(true);
        }
        Ok(Self { target, endpoint })
    }

    /// A channel that connects when it is first used. Needs a runtime.
    pub(crate) fn connect(&self) -> Transport {
        Transport(match &self.target {
            Target::Unix(path) => {
                let path = Arc::new(path.clone());
                let connector = tower::service_fn(move |_: Uri| unix(path.clone()));
                self.endpoint.connect_with_connector_lazy(connector)
            }
            Target::Tcp { .. } => self.endpoint.connect_lazy(),
        })
    }
}

fn tls(options: &Options) -> Result<Option<ClientTlsConfig>, Error> {
    let identity = match (&options.certificate_chain, &options.private_key) {
        (Some(chain), Some(key)) => Some(Identity::from_pem(chain, key.reveal())),
        (None, None) => None,
        _ => return Err(Error::invalid("certificate_chain and private_key come together")),
    };
    if !options.tls && options.root_certificates.is_none() && identity.is_none() {
        return Ok(None);
    }
    let mut tls = match &options.root_certificates {
        Some(pem) if pem.contains("-----BEGIN CERTIFICATE-----") => {
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(pem))
        }
        Some(_) => return Err(Error::invalid("root_certificates holds no PEM certificate")),
        None => ClientTlsConfig::new().with_native_roots(),
    };
    if let Some(identity) = identity {
        tls = tls.identity(identity);
    }
    Ok(Some(tls))
}

#[cfg(unix)]
async fn unix(path: Arc<PathBuf>) -> std::io::Result<TokioIo<tokio::net::UnixStream>> {
    tokio::net::UnixStream::connect(path.as_path()).await.map(TokioIo::new)
}

#[cfg(not(unix))]
async fn unix(_: Arc<PathBuf>) -> std::io::Result<TokioIo<tokio::net::TcpStream>> {
    Err(std::io::ErrorKind::Unsupported.into())
}

/// The source of a status that no sidecar sent.
#[derive(Debug)]
pub(crate) struct NotAnswered;

impl fmt::Display for NotAnswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the sidecar did not answer")
    }
}

impl StdError for NotAnswered {}

/// Whether `status` was made here, not by a sidecar.
pub(crate) fn not_answered(status: &Status) -> bool {
    status.source().is_some_and(|source| source.is::<NotAnswered>())
}

/// UNAVAILABLE for whatever broke: refused, reset, closed, GOAWAY, a failed handshake. tonic tells some of
/// them as UNKNOWN, INTERNAL or CANCELLED.
fn lost(error: &(dyn StdError + 'static)) -> Status {
    let mut root = error;
    let mut timed_out = root.is::<tonic::TimeoutExpired>();
    while let Some(source) = root.source() {
        root = source;
        timed_out |= root.is::<tonic::TimeoutExpired>();
    }
    let mut status = if timed_out {
        Status::deadline_exceeded(PASSED)
    } else {
        Status::unavailable(format!("The sidecar cannot be reached: {root}."))
    };
    status.set_source(Arc::new(NotAnswered));
    status
}

/// The message of a deadline that passed here.
pub(crate) const PASSED: &str = "The deadline passed without an answer.";

/// A channel whose failures are statuses, each with its right code.
#[derive(Clone)]
pub(crate) struct Transport(Channel);

impl Service<Request<Body>> for Transport {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Status>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.0.poll_ready(cx).map_err(|error| lost(&error))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let response = self.0.call(request);
        Box::pin(async move {
            let (mut head, body) = response.await.map_err(|error| lost(&error))?.into_parts();
            drop_garbled_details(&mut head.headers);
            let said = head.headers.contains_key(Status::GRPC_STATUS);
            let grpc = head.headers.get(CONTENT_TYPE).is_some_and(|it| it.as_bytes().starts_with(GRPC));
            let page = head.status != StatusCode::OK || !grpc;
            if page && !said {
                // A proxy's page: tonic goes by its status when there is nothing to read.
                return Ok(Response::from_parts(head, Body::empty()));
            }
            Ok(Response::from_parts(head, Body::new(Answer { body, complete: said })))
        })
    }
}

/// The body of an answer. One that ends without trailers was cut off: a reset stream looks like that.
struct Answer {
    body: Body,
    complete: bool,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(Ok(mut frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    drop_garbled_details(trailers);
                    self.complete = true;
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => Some(Err(lost(&error))),
            None if self.complete => None,
            None => {
                self.complete = true;
                Some(Err(lost(&CutOff)))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.complete && self.body.is_end_stream()
    }
}

#[derive(Debug)]
struct CutOff;

impl fmt::Display for CutOff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the answer was cut off")
    }
}

impl StdError for CutOff {}

/// tonic panics on details that are no base64; an error without details is better.
fn drop_garbled_details(headers: &mut HeaderMap) {
    let metadata = MetadataMap::from_headers(std::mem::take(headers));
    let garbled = metadata.get_bin(DETAILS).is_some_and(|details| details.to_bytes().is_err());
    *headers = metadata.into_headers();
    if garbled {
        headers.remove(DETAILS);
    }
}
