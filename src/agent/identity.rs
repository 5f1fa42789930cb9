//! The key of this host, and the text by which people compare keys.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::ParsedCertificate;
use serde::{Deserialize, Serialize};

use super::store::{self, Existing};
use super::{Error, Result};

/// The directory of the key in the state directory.
const DIRECTORY: &str = "identity";
/// The file of the key in that directory: PKCS #8 as PEM.
const KEY: &str = "key.pem";
/// An Ed25519 key in PEM takes less than 200 bytes.
const KEY_LIMIT: u64 = 4096;

/// The SHA-256 of a host's public key (of its SubjectPublicKeyInfo, RFC 5280 section 4.1.2.7).
///
/// Its text is `SHA256:` and 43 characters of base64url.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// The fingerprint of the key in a certificate.
    ///
    /// # Errors
    /// [`Error::BadCertificate`] if it is not an X.509 version 3 certificate.
    pub fn of_certificate(certificate: &CertificateDer<'_>) -> Result<Fingerprint> {
        let parsed = ParsedCertificate::try_from(certificate).map_err(Error::BadCertificate)?;
        Ok(Fingerprint(sha256(&parsed.subject_public_key_info())))
    }

    /// The digest itself.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub(super) const fn from_bytes(bytes: [u8; 32]) -> Fingerprint {
        Fingerprint(bytes)
    }
}

/// rustls has the hash for its own use; a crate of its own is not needed.
fn sha256(data: &[u8]) -> [u8; 32] {
    let suite = rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let output = match suite {
        rustls::SupportedCipherSuite::Tls13(suite) => suite.common.hash_provider.hash(data),
        #[allow(unreachable_patterns)]
        _ => unreachable!("TLS13_AES_128_GCM_SHA256 is a cipher suite of TLS 1.3"),
    };
    let mut digest = [0; 32];
    digest.copy_from_slice(output.as_ref());
    digest
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SHA256:{}", URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<Fingerprint> for String {
    fn from(fingerprint: Fingerprint) -> String {
        fingerprint.to_string()
    }
}

impl TryFrom<String> for Fingerprint {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl FromStr for Fingerprint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.strip_prefix("SHA256:")
            .filter(|digest| digest.len() == 43)
            .and_then(|digest| URL_SAFE_NO_PAD.decode(digest).ok())
            .and_then(|digest| digest.try_into().ok())
            .map(Fingerprint)
            .ok_or_else(|| Error::BadFingerprint {
                text: text.chars().take(80).collect(),
            })
    }
}

/// The key of this host and the certificate that carries it. Cheap to clone.
///
/// Only the key is kept on disk. The certificate is made from it whenever it is loaded, so there
/// is no pair of files that could fall apart, and nothing that expires.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    key: PrivateKeyDer<'static>,
    certificate: CertificateDer<'static>,
    fingerprint: Fingerprint,
}

impl Identity {
    /// Loads the key under `state_dir`, or makes one at the first call.
    ///
    /// Several processes may do this at once: all end up with the same key.
    ///
    /// # Errors
    /// [`Error::LooseMode`] and [`Error::ForeignKey`] if somebody else could have read the key,
    /// [`Error::Key`] if it is not an Ed25519 key, [`Error::File`] if it cannot be read or written.
    pub fn load_or_create(state_dir: &Path) -> Result<Identity> {
        let directory = state_dir.join(DIRECTORY);
        match Identity::load(&directory)? {
            Some(identity) => Ok(identity),
            None => {
                store::private_directory(&directory)?;
                let key =
                    rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(Error::NewKey)?;
                store::write(
                    &directory,
                    KEY,
                    key.serialize_pem().as_bytes(),
                    Existing::Keep,
                )?;
                // Read back: another process may have been first.
                Identity::load(&directory)?.ok_or_else(|| {
                    Error::file("find", directory.join(KEY))(std::io::ErrorKind::NotFound.into())
                })
            }
        }
    }

    fn load(directory: &Path) -> Result<Option<Identity>> {
        let path = directory.join(KEY);
        let file = match store::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::file("open", path)(error)),
        };
        let metadata = file.metadata().map_err(Error::file("look at", &path))?;
        if metadata.mode() & 0o077 != 0 {
            return Err(Error::LooseMode {
                path,
                mode: metadata.mode() & 0o7777,
                wanted: 0o600,
            });
        }
        let user = rustix::process::geteuid().as_raw();
        if metadata.uid() != user {
            return Err(Error::ForeignKey {
                path,
                owner: metadata.uid(),
                user,
            });
        }
        let parent = std::fs::metadata(directory).map_err(Error::file("look at", directory))?;
        if parent.mode() & 0o022 != 0 {
            return Err(Error::LooseMode {
                path: directory.into(),
                mode: parent.mode() & 0o7777,
                wanted: 0o700,
            });
        }
        let pem = store::read_open(file, &path, KEY_LIMIT)?;
        Identity::from_pem(&String::from_utf8_lossy(&pem))
            .map(Some)
            .map_err(|source| Error::Key { path, source })
    }

    fn from_pem(pem: &str) -> Result<Identity, rcgen::Error> {
        let key = rcgen::KeyPair::from_pkcs8_pem_and_sign_algo(pem, &rcgen::PKCS_ED25519)?;
        let mut parameters = rcgen::CertificateParams::default();
        parameters
            .distinguished_name
            .push(rcgen::DnType::CommonName, "livemig");
        let certificate = parameters.self_signed(&key)?;
        let certificate = certificate.der().clone();
        let fingerprint = Fingerprint::of_certificate(&certificate)
            // rcgen has just written it.
            .map_err(|_| rcgen::Error::CouldNotParseCertificate)?;
        Ok(Identity(Arc::new(Inner {
            key: PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            certificate,
            fingerprint,
        })))
    }

    /// The fingerprint of this host.
    pub fn fingerprint(&self) -> Fingerprint {
        self.0.fingerprint
    }

    pub(super) fn certificate(&self) -> CertificateDer<'static> {
        self.0.certificate.clone()
    }

    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        self.0.key.clone_key()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("fingerprint", &self.0.fingerprint)
            .field("key", &format_args!("…"))
            .finish()
    }
}
