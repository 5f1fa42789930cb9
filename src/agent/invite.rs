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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offer(name: &str, address: &str) -> Offer {
        Offer {
            name: name.parse().unwrap(),
            address: address.parse().unwrap(),
            fingerprint: Fingerprint::from_bytes([7; 32]),
        }
    }

    fn invites(limit: usize) -> (tempfile::TempDir, Invites) {
        let state = tempfile::tempdir().unwrap();
        let limits = Limits {
            invites: limit,
            ..Limits::default()
        };
        let invites = Invites::open(state.path(), &limits).unwrap();
        (state, invites)
    }

    proptest! {
        #[test]
        fn tokens_read_back(
            name in "[a-z0-9][a-z0-9.-]{0,62}",
            host in "[a-z]{1,60}(\\.[a-z]{1,60}){0,3}|\\[2001:db8::[1-9]\\]",
            port in 1u16..,
            key: [u8; 32],
            secret: [u8; 32],
            expires in 0u64..1 << 40,
        ) {
            let token = Token {
                offer: Offer {
                    fingerprint: Fingerprint::from_bytes(key),
                    ..offer(&name, &format!("{host}:{port}"))
                },
                secret: Secret(secret),
                expires: unix_seconds::to(expires).unwrap(),
            };
            let text = token.to_string();
            prop_assert!(text.len() <= TOKEN_LIMIT);
            prop_assert_eq!(text.parse::<Token>().unwrap(), token.clone());
            // As it is pasted.
            prop_assert_eq!(format!("  {text}\n").parse::<Token>().unwrap(), token);
        }

        #[test]
        fn a_token_that_was_cut_says_so(cut: usize) {
            let (_state, invites) = invites(1);
            let token = invites.create(&offer("host-a", "host-a.example"), Duration::from_secs(60)).unwrap();
            let text = token.to_string();
            // At least one character is left.
            let cut = &text[..text.len() - (1 + cut % (text.len() - 1))];
            prop_assert_eq!(cut.parse::<Token>(), Err(TokenError::Truncated));
        }

        #[test]
        fn a_token_that_was_changed_is_not_accepted(at in 0usize..150, to in "[A-Za-z0-9_-]") {
            let (_state, invites) = invites(1);
            let token = invites.create(&offer("host-a", "host-a.example"), Duration::from_secs(60)).unwrap();
            let mut text = token.to_string();
            let at = PREFIX.len() + at % (text.len() - PREFIX.len());
            prop_assume!(text[at..=at] != to);
            text.replace_range(at..=at, &to);
            prop_assert!(text.parse::<Token>().is_err());
        }

        #[test]
        fn any_text_is_read_without_harm(text: String, bytes: Vec<u8>) {
            prop_assert!(text.parse::<Token>().is_err());
            let text = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes));
            prop_assert!(text.parse::<Token>().is_err());
        }
    }

    #[test]
    fn what_is_no_token_is_told_apart() {
        for (text, error) in [
            ("", TokenError::NotAToken),
            ("host-b", TokenError::NotAToken),
            ("livemig", TokenError::Truncated),
            ("livemig1.", TokenError::Truncated),
            ("livemig1.AAAA", TokenError::Truncated),
            ("livemig1.A+/=", TokenError::Damaged),
            ("livemig2.AAAA", TokenError::OtherVersion),
            ("livemigX.AAAA", TokenError::NotAToken),
        ] {
            assert_eq!(text.parse::<Token>(), Err(error), "{text}");
        }
        let long = format!("livemig1.{}", "A".repeat(10_000_000));
        assert_eq!(long.parse::<Token>(), Err(TokenError::Damaged));
    }

    #[test]
    fn a_secret_is_seen_nowhere() {
        let (state, invites) = invites(1);
        let token = invites
            .create(&offer("a", "a"), Duration::from_secs(60))
            .unwrap();
        let debug = format!("{token:?}");
        assert!(debug.contains("secret: …"), "{debug}");
        let secret = String::from(token.secret.clone());
        let hex: String = token
            .secret
            .0
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let mut files = 0;
        for entry in std::fs::read_dir(state.path().join("invites")).unwrap() {
            let entry = entry.unwrap();
            let content = std::fs::read_to_string(entry.path()).unwrap();
            let name = entry.file_name().into_string().unwrap();
            for secret in [&secret, &hex] {
                assert!(!content.contains(secret) && !name.contains(secret));
            }
            files += 1;
        }
        assert_eq!(files, 1);
    }

    #[test]
    fn an_invitation_is_good_once() {
        let (state, invites) = invites(4);
        let token = invites
            .create(&offer("a", "a"), Duration::from_secs(60))
            .unwrap();
        let other = Invites::open(state.path(), &Limits::default()).unwrap();
        assert!(other.any_open().unwrap());
        other.check(&token.secret).unwrap();
        other.redeem(&token.secret).unwrap();
        assert!(matches!(
            invites.redeem(&token.secret),
            Err(Error::NotInvited)
        ));
        assert!(!invites.any_open().unwrap());
    }

    #[test]
    fn of_many_at_once_one_redeems() {
        let (_state, invites) = invites(1);
        for _ in 0..50 {
            let token = invites
                .create(&offer("a", "a"), Duration::from_secs(60))
                .unwrap();
            let barrier = std::sync::Barrier::new(4);
            let redeemed = std::thread::scope(|scope| {
                let tries: Vec<_> = (0..4)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            invites.redeem(&token.secret).is_ok()
                        })
                    })
                    .collect();
                tries
                    .into_iter()
                    .map(|one| one.join().unwrap())
                    .filter(|&ok| ok)
                    .count()
            });
            assert_eq!(redeemed, 1);
        }
    }

    #[test]
    fn invitations_end_and_make_room() {
        let (state, invites) = invites(2);
        let token = invites
            .create(&offer("a", "a"), Duration::from_secs(60))
            .unwrap();
        invites
            .create(&offer("a", "a"), Duration::from_secs(60))
            .unwrap();
        assert!(matches!(
            invites.create(&offer("a", "a"), Duration::from_secs(60)),
            Err(Error::TooManyInvites { limit: 2 })
        ));
        // One whose time has come, as after an hour.
        let file = format!("invites/{}.json", token.secret.digest());
        std::fs::write(state.path().join(file), r#"{"expires":1000}"#).unwrap();
        assert!(matches!(
            invites.check(&token.secret),
            Err(Error::InviteExpired)
        ));
        invites
            .create(&offer("a", "a"), Duration::from_secs(60))
            .unwrap();
        assert!(matches!(
            invites.redeem(&token.secret),
            Err(Error::NotInvited)
        ));
        assert_eq!(invites.withdraw_all().unwrap(), 2);
        assert!(!invites.any_open().unwrap());
        let year = Duration::from_secs(365 * 24 * 3600);
        assert!(matches!(
            invites.create(&offer("a", "a"), year),
            Err(Error::InviteTooLong { .. })
        ));
    }
}
