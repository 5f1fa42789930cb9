//! What can go wrong with a hop, and what the operator can do about it.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::HopId;

/// The result of everything in this module.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a hop could not be set up, checked or removed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of a hop (record, lock, socket, log) could not be used.
    #[error("could not {action} {}: {source}", path.display())]
    File {
        /// What was being done, as in "read".
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The record of a hop is not what this version writes.
    #[error("the record {} of a hop is damaged: {source}", path.display())]
    Record {
        /// The record.
        path: PathBuf,
        /// Where it stops making sense.
        source: serde_json::Error,
    },
    /// Another livemig held the lock for too long.
    #[error("waited {} s for another livemig to let go of {}", waited.as_secs(), path.display())]
    Locked {
        /// The lock.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// All 255 hop numbers are in use.
    #[error("all 255 hops of this host are in use")]
    Exhausted,
    /// There is no hop with this number.
    #[error("this host has no hop {0}")]
    Unknown(HopId),
    /// A hop was to be connected, checked or read before it was opened or connected.
    #[error("hop {hop} is not {needed} yet")]
    TooEarly {
        /// The hop.
        hop: HopId,
        /// What it should have been: "open" or "connected".
        needed: &'static str,
    },
    /// The system's random source failed.
    #[error("the system gave no random bytes for a key: {0}")]
    Random(getrandom::Error),
    /// A background task of ours was lost; only a bug or a shutdown does that.
    #[error("{0} was interrupted")]
    Interrupted(&'static str),
    /// The kernel refused a link, an address, a route or a rule.
    #[error("could not {action} for {interface}: {source}")]
    Netlink {
        /// What was being done, as in "add the address 10.0.0.1/31".
        action: String,
        /// The interface of the hop.
        interface: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A kernel parameter of the interface could not be set.
    #[error("could not write {value} to {}: {source}", path.display())]
    Sysctl {
        /// The parameter.
        path: PathBuf,
        /// The value it needs.
        value: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The host does not forward packets.
    #[error("this host does not forward IPv4 packets (net.ipv4.ip_forward is 0)")]
    NotForwarding,
    /// WireGuard, in the kernel or in the device process, refused its configuration.
    #[error("could not {action} of {interface} through WireGuard's uapi: {reason}")]
    Uapi {
        /// What was being done, as in "set the key".
        action: &'static str,
        /// The interface of the hop.
        interface: String,
        /// What it answered.
        reason: String,
    },
    /// WireGuard did not answer in time.
    #[error("WireGuard did not answer within {} s when asked to {action} of {interface}", waited.as_secs())]
    UapiTimeout {
        /// What was being done.
        action: &'static str,
        /// The interface of the hop.
        interface: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The program that hosts the userspace device could not be started.
    #[error("could not start {} for {interface}: {source}", helper.display())]
    Spawn {
        /// The program.
        helper: PathBuf,
        /// The interface of the hop.
        interface: String,
        /// Why it failed.
        source: io::Error,
    },
    /// The process that hosts the userspace device ended at once, or never became ready.
    #[error("the process of the device {interface} {what}{}", if log.is_empty() { String::new() } else { format!(": {log}") })]
    Device {
        /// The interface of the hop.
        interface: String,
        /// What it did: "ended (exit status: 1)".
        what: String,
        /// The last lines of its log.
        log: String,
    },
    /// The userspace device itself failed.
    #[error("the WireGuard device {interface} could not be created: {reason}")]
    Create {
        /// The interface of the hop.
        interface: String,
        /// What the device said.
        reason: String,
    },
    /// A process that has to go did not.
    #[error("process {pid} of {interface} did not end within {} s", waited.as_secs())]
    WouldNotEnd {
        /// The interface of the hop.
        interface: String,
        /// The process.
        pid: i32,
        /// How long was waited, SIGKILL included.
        waited: Duration,
    },
    /// No UDP port of the range is free.
    #[error("no UDP port from {first} to {last} could be used for {interface}: {reason}")]
    NoPort {
        /// The interface of the hop.
        interface: String,
        /// The first port that was tried.
        first: u16,
        /// The last port that was tried.
        last: u16,
        /// Why the last one failed.
        reason: String,
    },
    /// Every pool of tunnel addresses collides with something on one of the two hosts.
    #[error("no tunnel addresses are left that neither host uses or routes")]
    NoAddress,
    /// Both ends have the same key: a host was asked to make a hop to itself.
    #[error("both ends of the hop have the same key")]
    Itself,
    /// No handshake came about.
    #[error(
        "no WireGuard handshake with {endpoint} within {:.1} s: nothing valid came back from there",
        waited.as_secs_f64()
    )]
    NoHandshake {
        /// The interface of the hop.
        interface: String,
        /// Where the peer was expected.
        endpoint: SocketAddr,
        /// This host's own UDP port.
        listen_port: u16,
        /// How long was waited.
        waited: Duration,
    },
    /// Full-size packets of the peer do not arrive.
    #[error("packets of {mtu} bytes from {endpoint} do not arrive through {interface}: {received} bytes in {:.1} s", waited.as_secs_f64())]
    NoFullSize {
        /// The interface of the hop.
        interface: String,
        /// The peer.
        endpoint: SocketAddr,
        /// The size of packet that should have arrived.
        mtu: u16,
        /// What did arrive.
        received: u64,
        /// How long was waited.
        waited: Duration,
    },
    /// What shows that a hop has run empty could not be sent or looked for.
    #[error("could not look whether {interface} has run empty")]
    Marker {
        /// The interface of the hop.
        interface: String,
        /// Why it failed.
        source: io::Error,
    },
}

impl Error {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        let denied = |source: &io::Error| source.kind() == io::ErrorKind::PermissionDenied;
        match self {
            Error::File { source, .. } | Error::Netlink { source, .. } | Error::Sysctl { source, .. }
                if denied(source) =>
            {
                Some("Run livemig as root.".into())
            }
            Error::Record { path, .. } => Some(format!(
                "Remove {} after making sure that no migrated connection uses its interface any more.",
                path.display()
            )),
            Error::Locked { .. } => {
                Some("Look for a livemig that hangs (`ps -C livemig`), and try again.".into())
            }
            Error::Exhausted => Some(
                "A hop goes away with its last connection: end old connections (`livemig flows`) or \
                 move containers back."
                    .into(),
            ),
            Error::NotForwarding => Some(
                "Podman switches forwarding on when it makes a bridge network; otherwise run \
                 `sysctl -w net.ipv4.ip_forward=1`."
                    .into(),
            ),
            Error::Create { .. } | Error::Device { .. } => Some(
                "The userspace device needs /dev/net/tun (`modprobe tun`); kernel WireGuard needs \
                 none of this (`modprobe wireguard`)."
                    .into(),
            ),
            Error::NoPort { first, .. } => Some(format!(
                "Free UDP port {first} or the ones after it, or configure another first port."
            )),
            Error::NoAddress => Some(
                "Remove a wide route (such as 100.64.0.0/10, 198.18.0.0/15 or 10.0.0.0/8) from one \
                 of the hosts, or enable IPv6 on both: the tunnel needs two addresses of its own."
                    .into(),
            ),
            Error::NoHandshake {
                endpoint,
                listen_port,
                ..
            } => Some(format!(
                "Open UDP port {} of {} for this host, or UDP port {listen_port} of this host for \
                 {}: one of the two is enough. If a port is open, the hosts hold outdated keys: \
                 try again.",
                endpoint.port(),
                endpoint.ip(),
                endpoint.ip(),
            )),
            Error::NoFullSize { endpoint, .. } => Some(format!(
                "The path between this host and {} drops IP fragments: let firewalls on it pass \
                 fragments of UDP.",
                endpoint.ip()
            )),
            _ => None,
        }
    }
}

/// Turns what `std::fs` says into an [`Error::File`].
pub(super) fn file<'a>(
    action: &'static str,
    path: &'a std::path::Path,
) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::File {
        action,
        path: path.to_owned(),
        source,
    }
}
