//! How hosts come to trust one another, and how they talk.
//!
//! Whoever may restore a container on a host is as good as root there, so an agent that listens on
//! a network must be certain who is calling before it reads a word, and must not be brought down
//! by whoever is merely able to reach its port.
//!
//! - Every host has an [`Identity`]: one Ed25519 key that never leaves it. Its [`Fingerprint`] is
//!   the host's true name.
//! - [`Peers`] are the hosts it knows, by fingerprint, and what each of them may do here.
//! - Two hosts come to know one another through an invitation: [`Invites`] opens one and prints a
//!   [`Token`]; whoever brings it, once and in time, is recorded ([`join`]). There is no authority
//!   above the two hosts.
//! - A host gets another key by telling its peers of it with the one that they know ([`rekey()`]).
//! - Transport is HTTP/1.1 over TLS 1.3 with both keys pinned ([`Server`], [`Connection`]). The
//!   certificates are wrapping paper for the keys: names, dates and chains in them mean nothing.
//!   A key that is not known gets a TLS alert and nothing else, unless an invitation is open; then
//!   it may join, and nothing else.
//! - Everything that is read from outside, waited for or counted has a bound in [`Limits`].
//!
//! ```text
//!   caller                                        agent
//!     | -- TLS 1.3, certificate of the caller ---> |  key known?  no, no invitation: alert
//!     | <- certificate of the agent -------------- |
//!     |    fingerprint as expected? no: alert      |
//!     | -- GET /v1/hello ------------------------> |  livemig-protocol: 2, both ways
//!     | <- {name, version, you} ------------------ |
//!     | -- POST /v1/join {secret, name, address} > |  only with an invitation
//!     | -- POST /v1/key {next} ------------------> |  a peer will have another key
//!     | -- any other request --------------------> |  Handler, with the Peer who calls
//! ```

mod client;
mod endings;
mod error;
mod identity;
mod invite;
mod lazy_pages;
mod limits;
mod memory;
mod paths;
mod peer;
pub mod protocol;
mod rekey;
mod server;
mod session;
mod shell;
mod store;
mod tls;
mod wire;
pub use session::Sessions;

#[cfg(test)]
mod tests;

pub use client::{Connection, JoinAs, join};
pub use error::{Error, Refusal, Result};
pub use identity::{Fingerprint, Identity};
pub use invite::{Invites, Offer, Secret, Token, TokenError};
pub use limits::Limits;
pub use peer::{Address, Peer, PeerName, Peers, Permission, UnknownPermission};
pub use rekey::{Rekeyed, Told, Word, rekey};
pub use server::{Caller, Counters, Handler, Reply, ReplyBody, Server, Trust, reply};
pub use wire::Body;

/// The version of the protocol that this library speaks.
///
/// It is sent with every request and every answer in the header [`PROTOCOL_HEADER`], and both
/// sides refuse to go on with any other.
pub const PROTOCOL: u32 = 2;

/// The header that carries [`PROTOCOL`].
pub const PROTOCOL_HEADER: &str = "livemig-protocol";

/// The TCP port on which an agent listens unless told otherwise: "lm" in ASCII, 0x6c6d, which is
/// below Linux's ephemeral ports and not assigned by IANA.
pub const DEFAULT_PORT: u16 = 27757;

/// Points in time as whole seconds since 1970, in what is stored and sent.
mod unix_seconds {
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn from(time: SystemTime) -> u64 {
        time.duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs())
    }

    pub(super) fn to(seconds: u64) -> Option<SystemTime> {
        UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
    }

    pub(super) fn serialize<S: Serializer>(time: &SystemTime, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(from(*time))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SystemTime, D::Error> {
        to(u64::deserialize(from)?)
            .ok_or_else(|| serde::de::Error::custom("this time is beyond what can be represented"))
    }
}
