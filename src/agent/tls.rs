//! TLS 1.3 in which a key is either known or refused.
//!
//! The certificates only carry keys. Nothing in them is looked at but the key; what makes a key
//! good is that it is pinned, and that the other side signs the handshake with it. Sessions are
//! never resumed: a resumed one would not ask whether the key is still known.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, DistinguishedName,
    ServerConfig, SignatureScheme,
};

use super::{Error, Fingerprint, Identity, Invites, Peers, Result};

/// ring, with AES-128 before AES-256: a stream takes about 9 % less processor time, and 128 bits are
/// beyond guessing as well (RFC 8446 section 9.1 makes it the suite that everybody has).
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// What both verifiers do alike: the handshake must be signed with the key in the certificate.
#[derive(Debug)]
struct Signatures(Arc<CryptoProvider>);

impl Signatures {
    fn verify(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signed,
            &self.0.signature_verification_algorithms,
        )
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// TLS 1.2 is not offered, so this is never reached.
fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::General("only TLS 1.3 is spoken here".into()))
}

fn fingerprint(certificate: &CertificateDer<'_>) -> Result<Fingerprint, rustls::Error> {
    Fingerprint::of_certificate(certificate)
        .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))
}

/// Accepts the one host that is meant, at the calling side.
#[derive(Debug)]
pub(super) struct PinnedServer {
    signatures: Signatures,
    /// Any of these: a host that is about to have another key has two.
    expected: Vec<Fingerprint>,
    found: OnceLock<Fingerprint>,
}

impl PinnedServer {
    /// The fingerprint that the other side showed, if it was not an expected one.
    pub(super) fn other(&self) -> Option<Fingerprint> {
        self.found().filter(|found| !self.expected.contains(found))
    }

    /// The fingerprint that the other side showed.
    pub(super) fn found(&self) -> Option<Fingerprint> {
        self.found.get().copied()
    }
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found = fingerprint(end_entity)?;
        // One verifier serves one connection, so this is set once.
        let _ = self.found.set(found);
        if self.expected.contains(&found) {
            Ok(ServerCertVerified::assertion())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signatures.verify(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signatures.schemes()
    }
}

/// Accepts known peers at the agent; while an invitation is open, anybody who has a key.
#[derive(Debug)]
struct KnownClient {
    signatures: Signatures,
    peers: Peers,
    invites: Invites,
}

impl ClientCertVerifier for KnownClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let found = fingerprint(end_entity)?;
        let known = self
            .peers
            .by_fingerprint(found)
            .and_then(|peer| Ok(peer.is_some() || self.invites.any_open()?));
        match known {
            Ok(true) => Ok(ClientCertVerified::assertion()),
            Ok(false) => Err(CertificateError::ApplicationVerificationFailure.into()),
            Err(error) => {
                tracing::error!(%error, "a caller was refused because the known hosts cannot be read");
                Err(CertificateError::ApplicationVerificationFailure.into())
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.signatures.verify(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.signatures.schemes()
    }
}

/// TLS as the calling side speaks it, to one host only.
pub(super) fn client(
    identity: &Identity,
    expected: Vec<Fingerprint>,
) -> Result<(Arc<ClientConfig>, Arc<PinnedServer>)> {
    let provider = provider();
    let verifier = Arc::new(PinnedServer {
        signatures: Signatures(provider.clone()),
        expected,
        found: OnceLock::new(),
    });
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(Error::TlsSetup)?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_client_auth_cert(vec![identity.certificate()], identity.key())
        .map_err(Error::TlsSetup)?;
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok((Arc::new(config), verifier))
}

/// The key of this host as it is at the moment: it may be replaced while the agent runs. Connections that
/// have begun go on with the one that they began with.
#[derive(Debug)]
struct OwnKey {
    provider: Arc<CryptoProvider>,
    now: Mutex<(Identity, Arc<CertifiedKey>)>,
}

impl OwnKey {
    fn new(identity: &Identity, provider: Arc<CryptoProvider>) -> Result<OwnKey, rustls::Error> {
        let now = Mutex::new((identity.clone(), certified(identity, &provider)?));
        Ok(OwnKey { provider, now })
    }
}

fn certified(
    identity: &Identity,
    provider: &CryptoProvider,
) -> Result<Arc<CertifiedKey>, rustls::Error> {
    let key = provider.key_provider.load_private_key(identity.key())?;
    Ok(Arc::new(CertifiedKey::new(
        vec![identity.certificate()],
        key,
    )))
}

impl ResolvesServerCert for OwnKey {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // Both halves are replaced at once.
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let newer = now.0.successor().and_then(|newer| {
            let newer = newer.map(|it| Ok((certified(&it, &self.provider)?, it)));
            newer.transpose().map_err(Error::TlsSetup)
        });
        match newer {
            Ok(None) => {}
            Ok(Some((certified, identity))) => {
                let fingerprint = identity.fingerprint();
                if fingerprint != now.0.fingerprint() {
                    tracing::info!(%fingerprint, "this host has another key from now on");
                }
                *now = (identity, certified);
            }
            Err(error) => {
                tracing::error!(%error, "the key of this host cannot be read; the agent goes on with the one it has");
            }
        }
        Some(now.1.clone())
    }
}

/// TLS as the agent speaks it.
pub(super) fn server(
    identity: &Identity,
    peers: Peers,
    invites: Invites,
) -> Result<Arc<ServerConfig>> {
    let provider = provider();
    let key = OwnKey::new(identity, provider.clone()).map_err(Error::TlsSetup)?;
    let verifier = Arc::new(KnownClient {
        signatures: Signatures(provider.clone()),
        peers,
        invites,
    });
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(Error::TlsSetup)?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(key));
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
