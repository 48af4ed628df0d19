//! Targets, TLS and tokens.

use std::sync::Arc;

use keyturn::{Client, DecideRequest, Error, Options};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use crate::scripted::{Sidecar, deciding, ticket};

fn asked() -> DecideRequest {
    DecideRequest::new("u1", "openai")
}

fn refused(options: Options) -> String {
    match Client::new(options) {
        Err(Error::Invalid(what)) => what.into_owned(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn options_that_do_not_go_together_are_refused_by_name() {
    let certificates = Authority::new();
    let (chain, key) = certificates.issue("gateway", ExtendedKeyUsagePurpose::ClientAuth);
    let pem = certificates.pem();
    for (options, named) in [
        (Options::to("10.0.0.1:1"), "tls"),
        (Options::to("keyturn:1"), "tls"),
        (Options { tls: true, ..Options::to("unix:/run/k.sock") }, "tls"),
        (Options { root_certificates: Some(pem.clone()), ..Options::to("unix:/run/k.sock") }, "tls"),
        (Options { private_key: Some(key.clone().into()), ..Options::to("keyturn:1") }, "certificate_chain"),
        (Options { certificate_chain: Some(chain.clone()), ..Options::to("keyturn:1") }, "private_key"),
        (
            Options { root_certificates: Some("nonsense".into()), ..Options::to("keyturn:1") },
            "root_certificates",
        ),
        (
            Options {
                root_certificates: Some(pem),
                certificate_chain: Some(chain),
                private_key: Some("sk-canary-nonsense".into()),
                ..Options::to("keyturn:1")
            },
            "private_key",
        ),
        (Options::to("nonsense"), "target"),
        (Options { timeout: std::time::Duration::ZERO, ..Options::to("unix:k") }, "timeout"),
        (
            Options {
                retries: keyturn::Retries { attempts: 0, ..Default::default() },
                ..Options::to("unix:k")
            },
            "retries",
        ),
    ] {
        let what = refused(options);
        assert!(what.contains(named), "{named}: {what}");
        assert!(!what.contains("canary") && !what.contains("BEGIN"), "{what}");
    }
}

#[test]
fn a_token_that_is_none_is_refused_without_being_quoted() {
    for token in ["", "  ", "can ary", "can\nary", "canäry", "can\u{0}ary"] {
        let what = refused(Options { token: Some(token.into()), ..Options::to("unix:/run/k.sock") });
        assert!(what.contains("token") && !what.contains("can"), "{what}");
    }
}

#[tokio::test]
async fn plain_text_and_tokens_on_loopback() {
    let sidecar = Sidecar::tcp(None, deciding([ticket()]));
    let options = Options { token: Some("t0ken".into()), ..sidecar.options() };
    assert!(Client::new(options).unwrap().decide(asked()).await.unwrap().allowed());
    let seen = sidecar.seen("Decide").remove(0);
    assert_eq!(seen.headers["authorization"], "Bearer t0ken");
    assert_eq!(seen.authority, sidecar.target);
}

#[tokio::test]
async fn tls_by_our_own_authority_and_no_other() {
    let ours = Authority::new();
    let sidecar = Sidecar::tcp(Some(ours.acceptor(false)), deciding([ticket()]));
    let with = |options: Options| {
        Client::new(Options { retries: keyturn::Retries { attempts: 1, ..Default::default() }, ..options })
            .unwrap()
    };

    let trusting = with(Options { root_certificates: Some(ours.pem()), ..sidecar.options() });
    assert!(trusting.decide(asked()).await.unwrap().allowed());

    let foreign = with(Options { root_certificates: Some(Authority::new().pem()), ..sidecar.options() });
    let error = foreign.decide(asked()).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
    let plain = with(sidecar.options());
    let error = plain.decide(asked()).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
}

#[tokio::test]
async fn mutual_tls_with_the_clients_certificate_and_not_without() {
    let ours = Authority::new();
    let sidecar = Sidecar::tcp(Some(ours.acceptor(true)), deciding([ticket()]));
    let trusting = Options { root_certificates: Some(ours.pem()), ..sidecar.options() };
    let (chain, key) = ours.issue("gateway", ExtendedKeyUsagePurpose::ClientAuth);
    let known = Options { certificate_chain: Some(chain), private_key: Some(key.into()), ..trusting.clone() };
    assert!(Client::new(known).unwrap().decide(asked()).await.unwrap().allowed());
    let once = keyturn::Retries { attempts: 1, ..Default::default() };
    let unknown = Client::new(Options { retries: once, ..trusting }).unwrap();
    let error = unknown.decide(asked()).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable(_)), "{error:?}");
}

/// A certificate authority of a test.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }

    /// A certificate and its key, both PEM.
    fn issue(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.into()]).unwrap();
        params.extended_key_usages = vec![usage];
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    fn acceptor(&self, mutual: bool) -> TlsAcceptor {
        let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec!["127.0.0.1".into()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(self.0.der().clone()).unwrap();
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = if mutual {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let mut config = builder.with_single_cert(vec![certificate.der().clone()], key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }
}
