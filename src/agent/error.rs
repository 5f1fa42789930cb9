//! What can go wrong between two agents, and what is said about it to the other side.

use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use hyper::StatusCode;
use serde::{Deserialize, Serialize};

use super::{Address, Fingerprint, PeerName, TokenError};

/// The result of something that has to do with trust or transport.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why trust could not be had, or a conversation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the agent's state could not be read or written.
    #[error("could not {doing} {}", path.display())]
    File {
        /// What was being done, as a verb.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Others than its owner can read the private key.
    #[error("{} can be used by others than its owner (mode {mode:04o}, wanted {wanted:04o})", path.display())]
    LooseMode {
        /// The key file or its directory.
        path: PathBuf,
        /// The permission bits that it has.
        mode: u32,
        /// The permission bits that it should have.
        wanted: u32,
    },
    /// The private key belongs to somebody else.
    #[error("the key file {} belongs to user {owner}, not to user {user} who runs this", path.display())]
    ForeignKey {
        /// The key file.
        path: PathBuf,
        /// The user it belongs to.
        owner: u32,
        /// The user who runs this process.
        user: u32,
    },
    /// The key file does not hold an Ed25519 key, or the certificate could not be made from it.
    #[error("could not make an identity from the key in {}", path.display())]
    Key {
        /// The key file.
        path: PathBuf,
        /// What the cryptographic library says.
        source: rcgen::Error,
    },
    /// A new key could not be made.
    #[error("could not make a new key")]
    NewKey(#[source] rcgen::Error),
    /// The system gave no random bytes.
    #[error("the system gave no random bytes: {0}")]
    Random(getrandom::Error),
    /// A file of the agent's state is larger than any that the agent writes.
    #[error("{} is larger than {limit} bytes, so it is not what it should be", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// The limit in bytes.
        limit: u64,
    },
    /// A file of the agent's state does not hold what it should.
    #[error("{} cannot be understood", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// Where reading stopped.
        source: serde_json::Error,
    },

    /// This cannot be the name of a host.
    #[error(
        "{name:?} cannot be the name of a host: 1 to 63 of a-z, 0-9, '.' and '-', with a letter or digit first"
    )]
    BadName {
        /// What was given.
        name: String,
    },
    /// This is not an address of an agent.
    #[error("{text:?} is not an address: {reason}")]
    BadAddress {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// This is not a fingerprint.
    #[error("{text:?} is not a fingerprint: \"SHA256:\" and 43 characters of base64url")]
    BadFingerprint {
        /// What was given.
        text: String,
    },
    /// The certificate that the other side showed cannot be read.
    #[error("the certificate of the other side cannot be read")]
    BadCertificate(#[source] rustls::Error),
    /// No peer has this name.
    #[error("no host named {name} is known here")]
    UnknownPeer {
        /// The name.
        name: PeerName,
    },
    /// The name is that of another host already.
    #[error("another host is known here by the name {name}: {fingerprint}")]
    NameTaken {
        /// The name.
        name: PeerName,
        /// Whose it is.
        fingerprint: Fingerprint,
    },
    /// The host is known by another name already.
    #[error("the host with the fingerprint {fingerprint} is known here already, as {name}")]
    KnownAs {
        /// The name by which it is known.
        name: PeerName,
        /// The fingerprint.
        fingerprint: Fingerprint,
    },
    /// No host that is known here has this key.
    #[error("no host with the key {fingerprint} is known here")]
    NotAPeer {
        /// The key.
        fingerprint: Fingerprint,
    },
    /// It is not known where the agent of a peer listens.
    #[error("it is not known where the agent of {name} listens")]
    NoWayTo {
        /// The peer.
        name: PeerName,
    },
    /// This host's key cannot be replaced while connections that began with it go on.
    #[error("this host's key is in use: a migration from here is under way")]
    KeyInUse,
    /// Another process is replacing this host's key.
    #[error("this host's key is being replaced by another process already")]
    KeyBeingReplaced,
    /// There are as many peers as there may be.
    #[error("this host knows {limit} hosts already, which is the limit")]
    TooManyPeers {
        /// The limit.
        limit: usize,
    },

    /// The token cannot be read.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// The token is past its time.
    #[error("this token expired {} s ago (by the clock of this host)", ago.as_secs())]
    TokenExpired {
        /// How long ago.
        ago: Duration,
    },
    /// The token is for this very host.
    #[error("this token invites hosts to this very host")]
    OwnToken,
    /// No such invitation is open.
    #[error("this invitation is not open: it was used, was withdrawn, or never was")]
    NotInvited,
    /// The invitation is past its time.
    #[error("this invitation has expired")]
    InviteExpired,
    /// There are as many open invitations as there may be.
    #[error("{limit} invitations are open, which is the limit")]
    TooManyInvites {
        /// The limit.
        limit: usize,
    },
    /// An invitation cannot be open for so long.
    #[error("an invitation can be open for {} s at most, not for {} s", limit.as_secs(), asked.as_secs())]
    InviteTooLong {
        /// What was asked for.
        asked: Duration,
        /// The limit.
        limit: Duration,
    },

    /// TLS cannot be set up on this host.
    #[error("could not set up TLS with the key of this host")]
    TlsSetup(#[source] rustls::Error),
    /// The agent cannot listen there.
    #[error("could not listen on {address}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why it failed.
        source: io::Error,
    },
    /// No TCP connection.
    #[error("could not connect to {address}")]
    Connect {
        /// To whom.
        address: Address,
        /// Why it failed.
        source: io::Error,
    },
    /// The TLS handshake failed.
    #[error("could not speak TLS 1.3 with {address}")]
    Handshake {
        /// With whom.
        address: Address,
        /// Why it failed.
        source: io::Error,
    },
    /// The host at the other end is not the one that was meant.
    #[error(
        "{address} is another host: it showed the fingerprint {found}, expected was {expected}"
    )]
    WrongHost {
        /// Where.
        address: Address,
        /// The fingerprint that was expected.
        expected: Fingerprint,
        /// The fingerprint that it showed.
        found: Fingerprint,
    },
    /// The other host does not know this one.
    #[error("{address} does not know this host, whose fingerprint is {own}")]
    NotAdmitted {
        /// Who refused.
        address: Address,
        /// The fingerprint of this host.
        own: Fingerprint,
    },
    /// The two sides speak different versions of the protocol.
    #[error(
        "{} speaks version {theirs} of the protocol, this host speaks version {ours}",
        who
    )]
    Protocol {
        /// The other side.
        who: String,
        /// The version of this library.
        ours: u32,
        /// What the other side sent as its version.
        theirs: String,
    },
    /// The other side understood, and refused.
    #[error("{message}")]
    Refused {
        /// What it refused for, stable and meant for programs.
        code: String,
        /// The same for people.
        message: String,
        /// What to do about it.
        hint: Option<String>,
        /// The status of the HTTP answer.
        status: u16,
    },
    /// Something took longer than it may.
    #[error("gave up after {} ms while {doing} (limit: {limit})", after.as_millis())]
    TimedOut {
        /// What was being done.
        doing: &'static str,
        /// The field of [`super::Limits`], or the argument, that ended it.
        limit: &'static str,
        /// How long it took.
        after: Duration,
    },
    /// Something from the other side, or for it, is larger than it may be.
    #[error("{what} is larger than {bytes} bytes (limit: {limit})")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The field of [`super::Limits`].
        limit: &'static str,
        /// Its value.
        bytes: usize,
    },
    /// A body is not the JSON that was expected.
    #[error("{what} cannot be understood")]
    BadJson {
        /// Which body.
        what: &'static str,
        /// Where reading stopped.
        source: serde_json::Error,
    },
    /// The connection broke.
    #[error("the connection broke while {doing}")]
    Lost {
        /// What was being done.
        doing: &'static str,
        /// How it broke.
        source: hyper::Error,
    },
    /// The connection was closed, or broke in an earlier call.
    #[error("the connection is closed")]
    Closed,
    /// The stream that was to be sent broke off on this side.
    #[error("the stream that was being sent broke off")]
    Source(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A request cannot be formed from its parts.
    #[error("this cannot be made into a request")]
    BadRequest(#[source] hyper::http::Error),
}

impl Error {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Error::LooseMode { path, wanted, .. } => format!(
                "if nobody else can have read it: chmod {wanted:o} {}; else remove it, and invite and join anew",
                path.display()
            ),
            Error::ForeignKey { .. } => "run this as the user who owns the key".into(),
            Error::Key { path, .. } => format!(
                "restore {} from a backup, or remove it and introduce this host to its peers anew",
                path.display()
            ),
            Error::BadFile { path, .. } | Error::FileTooLarge { path, .. } => format!(
                "remove {} and introduce the host anew",
                path.display()
            ),
            Error::UnknownPeer { .. } => {
                "`livemig hosts` lists those that are; to add one: `livemig invite` there, `livemig join TOKEN` here"
                    .into()
            }
            Error::BadName { .. } => "`livemig hosts` lists the names of those that are known".into(),
            Error::NameTaken { name, .. } => {
                format!("choose another name, or remove the host {name} first if it is gone")
            }
            Error::KnownAs { name, .. } => format!("use the name {name}, or remove that host first"),
            Error::Token(_) => {
                "copy the whole line that `livemig invite` printed; it starts with \"livemig1.\"".into()
            }
            Error::TokenExpired { .. } | Error::NotInvited | Error::InviteExpired => {
                "ask for a new token: `livemig invite` on the other host".into()
            }
            Error::KeyInUse => {
                "run `livemig rekey` again when the migration has ended: it goes on from where it is".into()
            }
            Error::KeyBeingReplaced => "wait for it".into(),
            Error::OwnToken => "use it on the other host".into(),
            Error::TooManyInvites { .. } => "wait until one expires, or withdraw one".into(),
            Error::Connect { address, .. } => format!(
                "is `livemig agent` running there, and does a firewall let TCP port {} through?",
                address.port()
            ),
            Error::Handshake { address, .. } => {
                format!("is it an agent of livemig that listens on {address}?")
            }
            Error::WrongHost { .. } => {
                "if the host was installed anew, remove it from the known hosts, and invite and join again; \
                 if not, somebody else answers at its address"
                    .into()
            }
            Error::NotAdmitted { .. } => {
                "it knew this host never, or no longer: `livemig invite` there, `livemig join TOKEN` here".into()
            }
            Error::Protocol { .. } => "install the same version of livemig on both hosts".into(),
            Error::Refused { hint, .. } => return hint.clone(),
            _ => return None,
        })
    }

    /// Makes the error of a failed operation on a file.
    pub(super) fn file(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::File {
            doing,
            path,
            source,
        }
    }
}

/// What an agent answers when it will not do what it was asked for.
///
/// It crosses the wire as `{"code": …, "message": …, "hint": …}` and becomes [`Error::Refused`] at
/// the caller. What it says is read by a peer: it must not hold what a peer may not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The status of the HTTP answer.
    pub status: StatusCode,
    /// What it is refused for, stable and meant for programs.
    pub code: Cow<'static, str>,
    /// The same for people.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl Refusal {
    /// A refusal without a hint.
    pub fn new(
        status: StatusCode,
        code: impl Into<Cow<'static, str>>,
        message: impl Into<String>,
    ) -> Refusal {
        Refusal {
            status,
            code: code.into(),
            message: message.into(),
            hint: None,
        }
    }

    /// The same refusal with a hint.
    pub fn with_hint(mut self, hint: impl Into<String>) -> Refusal {
        self.hint = Some(hint.into());
        self
    }

    pub(super) fn body(&self) -> RefusalBody {
        RefusalBody {
            code: self.code.to_string(),
            message: self.message.clone(),
            hint: self.hint.clone(),
        }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} ({}): {}",
            self.code,
            self.status.as_u16(),
            self.message
        )
    }
}

/// So that a handler can use `?` on what it reads from a request.
impl From<Error> for Refusal {
    fn from(error: Error) -> Refusal {
        let (status, code) = match &error {
            Error::TooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "body-too-large"),
            Error::TimedOut { .. } => (StatusCode::REQUEST_TIMEOUT, "too-slow"),
            Error::BadJson { .. } => (StatusCode::BAD_REQUEST, "bad-json"),
            Error::Lost { .. } => (StatusCode::BAD_REQUEST, "body-broken"),
            Error::NotInvited => (StatusCode::FORBIDDEN, "not-invited"),
            Error::InviteExpired => (StatusCode::FORBIDDEN, "invite-expired"),
            Error::NameTaken { .. } => (StatusCode::CONFLICT, "name-taken"),
            Error::NotAPeer { .. } => (StatusCode::FORBIDDEN, "not-a-peer"),
            Error::KnownAs { .. } => (StatusCode::CONFLICT, "known-by-other-name"),
            Error::TooManyPeers { .. } => (StatusCode::SERVICE_UNAVAILABLE, "too-many-peers"),
            _ => {
                // What it is about may be this host's own business.
                tracing::warn!(error = %error, "a request failed");
                return Refusal::new(
                    StatusCode::INTERNAL_SERVER_ERROR,
                    "internal",
                    "the agent failed; its log says why",
                );
            }
        };
        use std::error::Error as _;
        let message = match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        };
        Refusal {
            status,
            code: code.into(),
            message,
            hint: error.hint(),
        }
    }
}

/// [`Refusal`] on the wire.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RefusalBody {
    pub(super) code: String,
    pub(super) message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) hint: Option<String>,
}
