//! Another key for this host, without losing the trust of those who know it.
//!
//! The key that is known vouches for the one that comes: each peer is told over a connection that began
//! with the old one. From then on it takes both for this host, until it sees the new one used: that ends
//! the old one there. Nobody needs to be told twice, and each step can be taken again:
//!
//! ```text
//!            make next.pem          tell every peer          rename               show it to every peer
//!  at rest ───────────────▶ telling ───────────────▶ telling ──────▶ showing ───────────────────────▶ at rest
//!                              peers accept both     not before all    the old key does not exist      peers accept
//!                              the old one is used   have been told    any more                        the new one
//! ```
//!
//! Where it stands is which files there are, so a crash leaves one of these states and calling [`rekey`]
//! again goes on from it. Exactly one of the two keys is this host's at each moment, since a file takes
//! the other's name. That waits until no connection that began with the old one is open ([`key_in_use`]):
//! its first request after a peer has seen the new key would be refused. The agent looks for another key
//! with each handshake. What outlives a connection (migrations, tunnels) goes by [`Peer::lasting`].

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::{StreamExt, stream};
use hyper::Method;
use serde::Serialize;
use tokio::time::Instant;

use super::identity::{DIRECTORY, KEY};
use super::server::{Joined, NextKey};
use super::store::{self, Existing};
use super::{
    Connection, Error, Fingerprint, Identity, Invites, Limits, Peer, PeerName, Peers, Result,
};
use crate::error::with_sources;

/// The key that is to come.
const NEXT: &str = "next.pem";
/// There for as long as the new key has not been shown to everybody: an empty file.
const SHOWING: &str = "showing";
/// How many peers are spoken to at one time.
const AT_ONCE: usize = 16;
/// How often a lock is tried again that another process has.
const POLL: Duration = Duration::from_millis(20);

/// What one peer knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "word")]
pub enum Word {
    /// It knows the new key and no other.
    New,
    /// It accepts both keys.
    Both {
        /// Why it was not shown the new one; nothing if that is not its turn yet.
        #[serde(skip_serializing_if = "Option::is_none")]
        why: Option<String>,
    },
    /// It could not be told, and knows the old key only.
    Old {
        /// Why.
        why: String,
    },
    /// It was left out, or is not reached by this host, and knows the old key only, which does not exist any
    /// more: the two hosts have to be joined anew.
    Lost,
}

/// A peer and what it knows.
#[derive(Debug, Clone, Serialize)]
pub struct Told {
    /// Its name here.
    pub name: PeerName,
    /// What it knows.
    #[serde(flatten)]
    pub word: Word,
}

/// How far the replacement of a key has come.
#[derive(Debug, Clone, Serialize)]
pub struct Rekeyed {
    /// The key that this host has now.
    pub fingerprint: Fingerprint,
    /// The one that it is about to have. Nothing if it has it.
    pub next: Option<Fingerprint>,
    /// What each peer knows.
    pub peers: Vec<Told>,
    /// How many open invitations were withdrawn: they name the old key.
    pub invitations: usize,
}

impl Rekeyed {
    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        let settled = |told: &Told| matches!(told.word, Word::New | Word::Lost);
        self.next.is_none() && self.peers.iter().all(settled)
    }
}

/// Replaces the key of this host, or goes on with a replacement that has begun.
///
/// The key stays as it is when a peer cannot be told, unless it is among those `without` whom it is done:
/// these have to be joined anew afterwards.
///
/// # Errors
/// [`Error::KeyInUse`] if migrations from here go on, and [`Error::KeyBeingReplaced`]; [`Error::UnknownPeer`]
/// for a name in `without` that is none; [`Error::File`] and the like if the keys cannot be read or written.
pub async fn rekey(state_dir: &Path, without: &[PeerName], limits: &Limits) -> Result<Rekeyed> {
    let rekey = Rekey::begin(state_dir, without, limits)?;
    let _alone = store::lock_alone(state_dir)?.ok_or(Error::KeyBeingReplaced)?;
    let mut invitations = 0;
    if !rekey.is_replaced()? {
        let next = rekey.make()?;
        let invites = Invites::open(state_dir, limits)?;
        loop {
            let peers = rekey.tell(&next).await?;
            let told = |told: &Told| !matches!(told.word, Word::Old { .. });
            if !peers.iter().all(told) {
                return Ok(Rekeyed {
                    fingerprint: rekey.own()?.fingerprint(),
                    next: Some(next.fingerprint()),
                    peers,
                    invitations,
                });
            }
            if let Some(withdrawn) = rekey.replace(&peers, &invites).await? {
                invitations = withdrawn;
                break;
            }
        }
    }
    let own = rekey.own()?;
    let rekeyed = Rekeyed {
        fingerprint: own.fingerprint(),
        next: None,
        peers: rekey.show(&own).await?,
        invitations,
    };
    if rekeyed.is_done() {
        store::remove(&rekey.directory, SHOWING)?;
    }
    Ok(rekeyed)
}

/// Keeps the key in this directory from being replaced for as long as what is returned lives.
///
/// # Errors
/// [`Error::TimedOut`] if it is being replaced and that does not end, which takes milliseconds.
pub(super) async fn key_in_use(directory: &Path, limits: &Limits) -> Result<File> {
    store::private_directory(directory)?;
    let lock = until(limits.connect, || store::lock_shared(directory)).await?;
    lock.ok_or(Error::TimedOut {
        doing: "waiting for the key of this host, which is being replaced",
        limit: "connect",
        after: limits.connect,
    })
}

/// Tries to get a lock for a while.
async fn until(
    patience: Duration,
    lock: impl Fn() -> Result<Option<File>>,
) -> Result<Option<File>> {
    let began = Instant::now();
    loop {
        let locked = lock()?;
        if locked.is_some() || began.elapsed() >= patience {
            return Ok(locked);
        }
        tokio::time::sleep(POLL).await;
    }
}

/// The steps of a replacement. Each can be taken again.
struct Rekey<'a> {
    directory: PathBuf,
    peers: Peers,
    without: &'a [PeerName],
    limits: &'a Limits,
}

impl<'a> Rekey<'a> {
    fn begin(state_dir: &Path, without: &'a [PeerName], limits: &'a Limits) -> Result<Rekey<'a>> {
        Identity::load_or_create(state_dir)?;
        let peers = Peers::open(state_dir, limits)?;
        for name in without {
            peers.get(name)?;
        }
        Ok(Rekey {
            directory: state_dir.join(DIRECTORY),
            peers,
            without,
            limits,
        })
    }

    fn own(&self) -> Result<Identity> {
        Identity::load_or_make(&self.directory, KEY)
    }

    /// Whether the new key is this host's, and has not been shown to everybody.
    fn is_replaced(&self) -> Result<bool> {
        let showing = self.directory.join(SHOWING);
        let began = showing
            .try_exists()
            .map_err(Error::file("look at", showing))?;
        Ok(began && Identity::load(&self.directory, NEXT)?.is_none())
    }

    fn make(&self) -> Result<Identity> {
        Identity::load_or_make(&self.directory, NEXT)
    }

    /// Has each peer accept the new key as well.
    async fn tell(&self, next: &Identity) -> Result<Vec<Told>> {
        let own = self.own()?;
        let next = next.fingerprint();
        self.each(async |peer| {
            let told = async {
                let mut connection = self.open(peer, &own).await?;
                let Joined { name: _ } = connection
                    .call(Method::POST, "/v1/key", &NextKey { next })
                    .await?;
                Ok::<_, Error>(())
            };
            match told.await {
                Ok(()) => Word::Both { why: None },
                Err(error) => Word::Old {
                    why: with_sources(&error),
                },
            }
        })
        .await
    }

    /// Makes the next key this host's, when nothing that began with the present one goes on. Returns how
    /// many invitations it withdrew, which name the present one; `None` if there is a peer that was not told.
    async fn replace(&self, told: &[Told], invites: &Invites) -> Result<Option<usize>> {
        let lock = until(self.limits.answer, || store::lock_alone(&self.directory)).await?;
        let _alone = lock.ok_or(Error::KeyInUse)?;
        // Nobody becomes a peer while this lock is held; who has become one since knows this key only.
        let peers = self.peers.list()?;
        let was_told = |peer: &Peer| told.iter().any(|told| told.name == peer.name);
        if !peers.iter().all(was_told) {
            return Ok(None);
        }
        let withdrawn = invites.withdraw_all()?;
        store::write(&self.directory, SHOWING, b"", Existing::Replace)?;
        store::replace(&self.directory, NEXT, KEY)?;
        Ok(Some(withdrawn))
    }

    /// Lets each peer see the new key, which ends the old one there.
    async fn show(&self, own: &Identity) -> Result<Vec<Told>> {
        self.each(async |peer| match self.open(peer, own).await {
            Ok(_seen) => Word::New,
            // It was left out, or it would have been told, and could be.
            Err(Error::NotAdmitted { .. } | Error::NoWayTo { .. }) => Word::Lost,
            Err(error) => Word::Both {
                why: Some(with_sources(&error)),
            },
        })
        .await
    }

    /// Asks all peers at a time, as far as they are not left out.
    async fn each(&self, ask: impl AsyncFn(&Peer) -> Word) -> Result<Vec<Told>> {
        let peers = self.peers.list()?;
        let asked = stream::iter(&peers).map(async |peer| Told {
            name: peer.name.clone(),
            word: match self.without.contains(&peer.name) {
                true => Word::Lost,
                false => ask(peer).await,
            },
        });
        Ok(asked.buffered(AT_ONCE).collect().await)
    }

    async fn open(&self, peer: &Peer, own: &Identity) -> Result<Connection> {
        let address = peer.address.as_ref().ok_or_else(|| Error::NoWayTo {
            name: peer.name.clone(),
        })?;
        let keys = peer.keys().collect();
        Connection::open_to(address, keys, own, self.limits).await
    }
}
