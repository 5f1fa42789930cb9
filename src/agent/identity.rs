//! The key of this host, and the text by which people compare keys.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
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
pub(super) const DIRECTORY: &str = "identity";
/// The file of the key in that directory: PKCS #8 as PEM.
pub(super) const KEY: &str = "key.pem";
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
    /// Where it was read, and which file that was.
    path: PathBuf,
    stamp: Stamp,
}

/// Tells a file from another that has come in its place: device, inode, and when it was changed, in
/// seconds and nanoseconds.
type Stamp = (u64, u64, i64, i64);

fn stamp(metadata: &std::fs::Metadata) -> Stamp {
    (
        metadata.dev(),
        metadata.ino(),
        metadata.ctime(),
        metadata.ctime_nsec(),
    )
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
        Identity::load_or_make(&state_dir.join(DIRECTORY), KEY)
    }

    /// The same for a file of any name in the directory of the keys.
    pub(super) fn load_or_make(directory: &Path, name: &str) -> Result<Identity> {
        match Identity::load(directory, name)? {
            Some(identity) => Ok(identity),
            None => {
                store::private_directory(directory)?;
                let key =
                    rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(Error::NewKey)?;
                store::write(
                    directory,
                    name,
                    key.serialize_pem().as_bytes(),
                    Existing::Keep,
                )?;
                // Read back: another process may have been first.
                Identity::load(directory, name)?.ok_or_else(|| {
                    Error::file("find", directory.join(name))(std::io::ErrorKind::NotFound.into())
                })
            }
        }
    }

    /// The directory that its file is in.
    pub(super) fn directory(&self) -> &Path {
        self.0.path.parent().unwrap_or(Path::new("/"))
    }

    /// The key that came in the place of this one, if one did.
    pub(super) fn successor(&self) -> Result<Option<Identity>> {
        let path = &self.0.path;
        let metadata = std::fs::symlink_metadata(path).map_err(Error::file("look at", path))?;
        if stamp(&metadata) == self.0.stamp {
            return Ok(None);
        }
        Identity::load(self.directory(), KEY)
    }

    pub(super) fn load(directory: &Path, name: &str) -> Result<Option<Identity>> {
        let path = directory.join(name);
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
        Identity::from_pem(&String::from_utf8_lossy(&pem), &path, stamp(&metadata))
            .map(Some)
            .map_err(|source| Error::Key { path, source })
    }

    fn from_pem(pem: &str, path: &Path, stamp: Stamp) -> Result<Identity, rcgen::Error> {
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
            path: path.to_owned(),
            stamp,
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_key_is_made_once_and_is_private() {
        let state = tempfile::tempdir().unwrap();
        let state = state.path().join("livemig");
        let first = Identity::load_or_create(&state).unwrap();
        let again = Identity::load_or_create(&state).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&state), 0o700);
        assert_eq!(mode(&state.join("identity")), 0o700);
        assert_eq!(mode(&state.join("identity/key.pem")), 0o600);
        // Nothing else is left there.
        assert_eq!(
            std::fs::read_dir(state.join("identity")).unwrap().count(),
            1
        );
        assert!(format!("{first:?}").contains('…'));
    }

    #[test]
    fn many_who_start_at_once_have_one_key() {
        let state = tempfile::tempdir().unwrap();
        let fingerprints: Vec<_> = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        Identity::load_or_create(state.path())
                            .unwrap()
                            .fingerprint()
                    })
                })
                .collect();
            starts
                .into_iter()
                .map(|start| start.join().unwrap())
                .collect()
        });
        assert!(fingerprints.iter().all(|other| *other == fingerprints[0]));
    }

    #[test]
    fn a_key_that_others_can_reach_is_refused() {
        let state = tempfile::tempdir().unwrap();
        Identity::load_or_create(state.path()).unwrap();
        let directory = state.path().join("identity");
        let key = directory.join("key.pem");
        let chmod = |path: &Path, mode| {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        chmod(&key, 0o640);
        let error = Identity::load_or_create(state.path()).unwrap_err();
        assert!(
            matches!(error, Error::LooseMode { mode: 0o640, .. }),
            "{error:?}"
        );
        assert!(
            error.to_string().contains("mode 0640, wanted 0600"),
            "{error}"
        );
        assert!(error.hint().unwrap().contains("chmod 600"));
        chmod(&key, 0o400);
        chmod(&directory, 0o770);
        let error = Identity::load_or_create(state.path()).unwrap_err();
        assert!(
            matches!(error, Error::LooseMode { wanted: 0o700, .. }),
            "{error:?}"
        );
        chmod(&directory, 0o700);
        Identity::load_or_create(state.path()).unwrap();

        // A link is not followed, whatever it points to.
        std::fs::rename(&key, directory.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", &key).unwrap();
        let error = Identity::load_or_create(state.path()).unwrap_err();
        assert!(
            matches!(error, Error::File { doing: "open", .. }),
            "{error:?}"
        );
        // And what is no key says so, and stays.
        std::fs::remove_file(&key).unwrap();
        std::fs::write(&key, "no key").unwrap();
        chmod(&key, 0o600);
        let error = Identity::load_or_create(state.path()).unwrap_err();
        assert!(matches!(error, Error::Key { .. }), "{error:?}");
        assert_eq!(std::fs::read_to_string(&key).unwrap(), "no key");
    }

    /// The digest as OpenSSL computes it: `openssl x509 -pubkey -noout | openssl pkey -pubin
    /// -outform der | sha256sum`. For Ed25519 that DER is a fixed head and the key (RFC 8410).
    #[test]
    fn the_fingerprint_is_that_of_the_public_key() {
        let state = tempfile::tempdir().unwrap();
        let identity = Identity::load_or_create(state.path()).unwrap();
        let pem = std::fs::read_to_string(state.path().join("identity/key.pem")).unwrap();
        let key = rcgen::KeyPair::from_pem(&pem).unwrap();
        let head = [
            0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
        ];
        let spki = [&head[..], key.public_key_raw()].concat();
        assert_eq!(identity.fingerprint().as_bytes(), &sha256(&spki));
        // FIPS 180-4's example, in this text form.
        let abc = Fingerprint::from_bytes(sha256(b"abc"));
        assert_eq!(
            abc.to_string(),
            "SHA256:ungWv48Bz-pBQUDeXa4iI7ADYaOWF3qctBD_YfIAFa0"
        );
    }

    #[test]
    fn fingerprints_read_back() {
        let fingerprint = Fingerprint::from_bytes(sha256(b"abc"));
        let text = fingerprint.to_string();
        assert_eq!(text.parse::<Fingerprint>().unwrap(), fingerprint);
        let json = serde_json::to_string(&fingerprint).unwrap();
        assert_eq!(json, format!("\"{text}\""));
        assert_eq!(
            serde_json::from_str::<Fingerprint>(&json).unwrap(),
            fingerprint
        );
        for bad in [
            "",
            "SHA256:",
            &text[..49],
            &text[7..],
            &text.replace("SHA256", "sha256"),
            &format!("{text}A"),
        ] {
            assert!(
                matches!(
                    bad.parse::<Fingerprint>(),
                    Err(Error::BadFingerprint { .. })
                ),
                "{bad}"
            );
        }
    }
}
