//! What can go wrong with connections.

use std::time::Duration;

use super::{Entry, Tuple};
use crate::netlink;

/// The result of something done to connections.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something could not be done to connections.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel could not be asked, or refused.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// What was asked of one connection was refused.
    #[error("cannot {doing} the connection {tuple}: {source}")]
    Connection {
        /// What was being done.
        doing: &'static str,
        /// To which connection, in its original direction.
        tuple: Box<Tuple>,
        /// The kernel's reason.
        source: netlink::Error,
    },
    /// A connection cannot be inserted because another one uses its addresses and ports.
    #[error("cannot insert the connection {}: another one is in its place, {}", wanted.original, existing)]
    Occupied {
        /// What was to be inserted.
        wanted: Box<Entry>,
        /// What is there.
        existing: Box<Entry>,
    },
    /// The background thread that did the work ended early.
    #[error("the thread that was to {doing} ended early")]
    Thread {
        /// What it was to do.
        doing: &'static str,
    },
    /// The `nft` program could not be run.
    #[error("cannot run {program} to {doing}: {source}")]
    NftExecution {
        /// What was being done.
        doing: &'static str,
        /// The program.
        program: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The `nft` program refused a set of rules.
    #[error("nft refused to {doing}: {stderr}")]
    NftRefused {
        /// What was being done.
        doing: &'static str,
        /// What it said.
        stderr: String,
    },
    /// The `nft` program did not end in time.
    #[error("nft did not {doing} within {} s", waited.as_secs())]
    NftSilent {
        /// What was being done.
        doing: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// Another process uses the queue.
    #[error("the netfilter queue {queue} is used by another process")]
    QueueTaken {
        /// The number of the queue.
        queue: u16,
    },
    /// So many queues are taken that none was found.
    #[error("none of {tried} netfilter queues from {first} on is free")]
    NoFreeQueue {
        /// The first that was tried.
        first: u16,
        /// How many were.
        tried: u16,
    },
    /// The kernel can neither `queue` in nftables nor use the xtables target.
    #[error(
        "this kernel cannot send packets to a queue: it has neither nft_queue nor xt_NFQUEUE with \
         nft_compat"
    )]
    NoQueue,
    /// A hold cannot be as it was asked for.
    #[error("cannot hold packets: {what}")]
    BadHold {
        /// What is wrong with it.
        what: &'static str,
    },
}

impl Error {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::Netlink(source) | Error::Connection { source, .. } => source.hint(),
            Error::Occupied { existing, .. } => Some(format!(
                "if that connection is a remnant, remove it: conntrack -D {}",
                existing.original.as_conntrack_arguments()
            )),
            Error::NftExecution { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Some("install the package nftables".to_owned())
            }
            Error::NftExecution { .. } | Error::NftRefused { .. } => {
                Some("livemig needs nftables 1.0.6 or newer, and root".to_owned())
            }
            Error::QueueTaken { queue } => Some(format!(
                "see who uses queue {queue} in /proc/net/netfilter/nfnetlink_queue"
            )),
            Error::NoFreeQueue { .. } => {
                Some("see who uses them in /proc/net/netfilter/nfnetlink_queue".to_owned())
            }
            Error::NoQueue => Some(
                "load the module: modprobe nft_queue (or modprobe nft_compat xt_NFQUEUE)"
                    .to_owned(),
            ),
            Error::NftSilent { .. } | Error::Thread { .. } | Error::BadHold { .. } => None,
        }
    }
}
