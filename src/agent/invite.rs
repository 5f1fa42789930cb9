//! Invitations: how a host that is not known yet becomes a peer, once and in time.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};

use super::store::{self, Existing};
use super::{Address, Error, Fingerprint, Limits, PeerName, Result, unix_seconds};

/// The directory of the invitations in the state directory.
const DIRECTORY: &str = "invites";
/// An invitation's file takes less than 100 bytes.
const FILE_LIMIT: u64 = 4096;
/// What every token starts with; the number is the version of its format.
const PREFIX: &str = "livemig1.";
/// A token is shorter than this: 9 + 4/3 × (8 + 32 + 32 + 1 + 63 + 2 + 261 + 4).
const TOKEN_LIMIT: usize = 600;
/// The bytes of the checksum at the end of a token.
const CHECKSUM: usize = 4;

/// The secret of an invitation. Whoever knows it can become a peer.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Secret([u8; 32]);

impl Secret {
    /// What stands on disk in its place, and is the name of the invitation's file.
    ///
    /// The secret has 256 random bits, so a fast hash gives nothing away.
    fn digest(&self) -> String {
        blake3::derive_key("livemig 2026 invitation", &self.0)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl From<Secret> for String {
    fn from(secret: Secret) -> String {
        URL_SAFE_NO_PAD.encode(secret.0)
    }
}

impl TryFrom<String> for Secret {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        URL_SAFE_NO_PAD
            .decode(text)
            .ok()
            .and_then(|bytes| bytes.try_into().ok())
            .map(Secret)
            .ok_or("a secret is 43 characters of base64url")
    }
}

/// Who invites, and where to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Offer {
    /// What the inviting host calls itself.
    pub name: PeerName,
    /// Where its agent listens.
    pub address: Address,
    /// Its key.
    pub fingerprint: Fingerprint,
}

/// What `livemig invite` prints and `livemig join` takes: one line of text, `livemig1.` and
/// base64url.
///
/// In the base64url: expiry (8 bytes, seconds since 1970), fingerprint (32), secret (32), name
/// (length in 1 byte, text), address (length in 2 bytes, text), and the first 4 bytes of the
/// BLAKE3 of all that. Integers are big-endian.
///
/// `Debug` does not show the secret; `Display` is the token itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Who invites, and where to.
    pub offer: Offer,
    /// The proof of having been invited.
    pub secret: Secret,
    /// Until when, in whole seconds.
    pub expires: SystemTime,
}

/// Why a text is not a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It is something else.
    #[error("this is not a token of livemig: it does not start with \"livemig1.\"")]
    NotAToken,
    /// It is a token of another version of livemig.
    #[error("this token was made by another version of livemig")]
    OtherVersion,
    /// It stops early.
    #[error("this token is truncated")]
    Truncated,
    /// A character of it was changed.
    #[error("this token is damaged")]
    Damaged,
}

impl Token {
    /// How long ago it expired, if it did.
    pub fn expired(&self, now: SystemTime) -> Option<Duration> {
        now.duration_since(self.expires).ok()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, address) = (self.offer.name.as_str(), self.offer.address.to_string());
        let mut bytes = Vec::with_capacity(TOKEN_LIMIT);
        bytes.extend(unix_seconds::from(self.expires).to_be_bytes());
        bytes.extend(self.offer.fingerprint.as_bytes());
        bytes.extend(self.secret.0);
        // A name has at most 63 bytes, an address at most 261.
        bytes.push(name.len() as u8);
        bytes.extend(name.as_bytes());
        bytes.extend((address.len() as u16).to_be_bytes());
        bytes.extend(address.as_bytes());
        bytes.extend(checksum(&bytes));
        write!(f, "{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let Some(encoded) = text.strip_prefix(PREFIX) else {
            let other = text
                .strip_prefix("livemig")
                .and_then(|rest| rest.split_once('.'))
                .is_some_and(|(version, _)| version.parse::<u32>().is_ok());
            return Err(match other {
                true => TokenError::OtherVersion,
                // What a person gets who copies the first few characters only.
                false if !text.is_empty() && PREFIX.starts_with(text) => TokenError::Truncated,
                false => TokenError::NotAToken,
            });
        };
        if text.len() > TOKEN_LIMIT {
            return Err(TokenError::Damaged);
        }
        let bytes = match URL_SAFE_NO_PAD.decode(encoded) {
            Ok(bytes) => bytes,
            Err(base64::DecodeError::InvalidByte(..)) => return Err(TokenError::Damaged),
            // A length or a last symbol that no encoding has: the end is missing.
            Err(_) => return Err(TokenError::Truncated),
        };
        let mut rest = bytes.as_slice();
        let expires =
            unix_seconds::to(u64::from_be_bytes(take(&mut rest)?)).ok_or(TokenError::Damaged)?;
        let fingerprint = Fingerprint::from_bytes(take(&mut rest)?);
        let secret = Secret(take(&mut rest)?);
        let [length] = take::<1>(&mut rest)?;
        let name = take_text(&mut rest, length.into())?;
        let length = u16::from_be_bytes(take(&mut rest)?);
        let address = take_text(&mut rest, length.into())?;
        let sum: [u8; CHECKSUM] = take(&mut rest)?;
        if !rest.is_empty() || sum != checksum(&bytes[..bytes.len() - CHECKSUM]) {
            return Err(TokenError::Damaged);
        }
        Ok(Token {
            offer: Offer {
                name: name.parse().map_err(|_| TokenError::Damaged)?,
                address: address.parse().map_err(|_| TokenError::Damaged)?,
                fingerprint,
            },
            secret,
            expires,
        })
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM] {
    let hash = blake3::hash(bytes);
    let [a, b, c, d, ..] = *hash.as_bytes();
    [a, b, c, d]
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], TokenError> {
    let (head, tail) = rest.split_first_chunk().ok_or(TokenError::Truncated)?;
    *rest = tail;
    Ok(*head)
}

fn take_text<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a str, TokenError> {
    let (head, tail) = rest.split_at_checked(length).ok_or(TokenError::Truncated)?;
    *rest = tail;
    std::str::from_utf8(head).map_err(|_| TokenError::Damaged)
}

/// What is on disk of an invitation.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    #[serde(with = "unix_seconds")]
    expires: SystemTime,
}

/// The store of the open invitations: one file for each under `<state_dir>/invites`, named by a
/// hash of its secret.
///
/// Time is the wall clock of the inviting host: if that is set back, its invitations stay open for
/// longer.
#[derive(Debug, Clone)]
pub struct Invites {
    directory: PathBuf,
    limit: usize,
    longest: Duration,
}

impl Invites {
    /// The store under a state directory. Creates its directory.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be created.
    pub fn open(state_dir: &Path, limits: &Limits) -> Result<Invites> {
        let directory = state_dir.join(DIRECTORY);
        store::private_directory(&directory)?;
        Ok(Invites {
            directory,
            limit: limits.invites,
            longest: limits.invite,
        })
    }

    /// Opens an invitation for `ttl`.
    ///
    /// # Errors
    /// [`Error::InviteTooLong`], [`Error::TooManyInvites`], [`Error::File`] if it cannot be
    /// recorded.
    pub fn create(&self, offer: &Offer, ttl: Duration) -> Result<Token> {
        if ttl > self.longest {
            return Err(Error::InviteTooLong {
                asked: ttl,
                limit: self.longest,
            });
        }
        let _lock = store::lock(&self.directory)?;
        let now = SystemTime::now();
        if self.sweep(now)? >= self.limit {
            return Err(Error::TooManyInvites { limit: self.limit });
        }
        let secret = Secret(store::random()?);
        // Whole seconds, rounded up: what is printed is what is on disk.
        let expires = unix_seconds::from(now + ttl + Duration::from_nanos(999_999_999));
        let expires = unix_seconds::to(expires).unwrap_or(now);
        let name = format!("{}.json", secret.digest());
        let content = serde_json::to_vec(&Record { expires }).map_err(|source| Error::BadFile {
            path: self.directory.join(&name),
            source,
        })?;
        store::write(&self.directory, &name, &content, Existing::Keep)?;
        Ok(Token {
            offer: offer.clone(),
            secret,
            expires,
        })
    }

    /// Whether any invitation is open.
    ///
    /// # Errors
    /// [`Error::File`] if the directory cannot be read.
    pub fn any_open(&self) -> Result<bool> {
        let now = SystemTime::now();
        for name in store::names(&self.directory)? {
            if self
                .record(&name)?
                .is_some_and(|record| now < record.expires)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether this secret would be accepted now; it is not used up.
    ///
    /// # Errors
    /// [`Error::NotInvited`], [`Error::InviteExpired`], [`Error::File`].
    pub fn check(&self, secret: &Secret) -> Result<()> {
        match self.record(&secret.digest())? {
            None => Err(Error::NotInvited),
            Some(record) if record.expires <= SystemTime::now() => Err(Error::InviteExpired),
            Some(_) => Ok(()),
        }
    }

    /// Uses up an invitation. Of several callers with the same secret, one succeeds.
    ///
    /// # Errors
    /// [`Error::NotInvited`], [`Error::InviteExpired`], [`Error::File`].
    pub fn redeem(&self, secret: &Secret) -> Result<()> {
        let checked = self.check(secret);
        if matches!(checked, Ok(()) | Err(Error::InviteExpired))
            // The atomic step: unlink(2) succeeds once.
            && !store::remove(&self.directory, &format!("{}.json", secret.digest()))?
        {
            return Err(Error::NotInvited);
        }
        checked
    }

    /// Withdraws every open invitation, and returns how many there were.
    ///
    /// # Errors
    /// [`Error::File`] if one cannot be removed.
    pub fn withdraw_all(&self) -> Result<usize> {
        let _lock = store::lock(&self.directory)?;
        let mut withdrawn = 0;
        for name in store::names(&self.directory)? {
            if store::remove(&self.directory, &format!("{name}.json"))? {
                withdrawn += 1;
            }
        }
        Ok(withdrawn)
    }

    fn record(&self, name: &str) -> Result<Option<Record>> {
        let path = self.directory.join(format!("{name}.json"));
        let Some(content) = store::read(&path, FILE_LIMIT)? else {
            return Ok(None);
        };
        match serde_json::from_slice(&content) {
            Ok(record) => Ok(Some(record)),
            Err(error) => {
                // Files are written whole, so this is none of ours: it invites nobody.
                tracing::warn!(path = %path.display(), %error, "passed over an invitation");
                Ok(None)
            }
        }
    }

    /// Removes what has expired; returns how many are left.
    fn sweep(&self, now: SystemTime) -> Result<usize> {
        let mut left = 0;
        for name in store::names(&self.directory)? {
            match self.record(&name)? {
                Some(record) if now < record.expires => left += 1,
                _ => {
                    store::remove(&self.directory, &format!("{name}.json"))?;
                }
            }
        }
        Ok(left)
    }
}
