//! Forgetting a host, at once.
//!
//! First its key, so that whatever it asks from then on is refused; the agent looks a caller up for
//! each request. Then what only it had a use for: new connections that were carried to it or from it,
//! and the hop. A hop that live connections take stays until they have ended, unless they are to be
//! cut off. Migrations from it that have only prepared something are undone by this host's agent,
//! which notices that their source is not known any more.

use serde::Serialize;

use super::flows::all_unless_gone;
use super::forwarding;
use super::hop::tunnels;
use super::journal::{Journal, JournalError, left_behind, number_of, under_way};
use super::must_be_root;
use super::report::Leftover;
use crate::agent::{Fingerprint, Invites, Peer, PeerName, Peers, Permission};
use crate::conntrack::{Direction, Entry, Family, Table, alias, steer};
use crate::migration::Effect;
use crate::netlink::Namespace;
use crate::tunnel::{Hop, HopId};
use crate::{Config, Error, Result};

/// What became of the tunnel to a host that was forgotten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hopless {
    /// There was none.
    None,
    /// It was taken down.
    Down,
    /// It stays until what uses it has ended.
    Kept,
}

/// What was done about a host that this one trusts no more.
#[derive(Debug, Clone, Serialize)]
pub struct Revoked {
    /// What it was called here; nothing if it had been forgotten before.
    pub name: Option<PeerName>,
    /// What its tunnel is known by: its key, which gets nothing but refusals from now on, or the first one
    /// that it had here.
    pub fingerprint: Fingerprint,
    /// What became of the tunnel to it.
    pub hop: Hopless,
    /// The connections that go through that tunnel still, or that were cut off with it.
    pub flows: Vec<String>,
    /// The migrations through that tunnel that have not ended.
    pub migrations: Vec<String>,
    /// The containers whose new connections are not carried to it, or from it, any more.
    pub forwardings: Vec<String>,
    /// How many open invitations were withdrawn: the host may have had the token of one.
    pub invitations: usize,
    /// The hosts that may introduce others, and so could make its key known again (for paths only).
    pub introducers: Vec<PeerName>,
    /// What could not be done. Calling this again tries it again.
    pub leftovers: Vec<Leftover>,
}

/// Forgets the host of this name, or the one with this fingerprint.
///
/// With `now`, connections that go through the tunnel to it are cut off. Of a host that was forgotten
/// before, what was kept then can be ended by its fingerprint.
///
/// # Errors
/// [`Error::Agent`] if no such host is known; [`Error::RevokeUnsettled`] without `now` if a migration
/// to it has not ended. Nothing has been changed then.
pub async fn revoke(config: &Config, host: &str, now: bool) -> Result<Revoked> {
    must_be_root()?;
    let peers = Peers::open(&config.state_dir, &config.limits)?;
    let (name, fingerprint) = match host.parse::<Fingerprint>() {
        Ok(fingerprint) => {
            let known = peers.by_fingerprint(fingerprint)?;
            let lasting = known.as_ref().map_or(fingerprint, Peer::lasting);
            (known.map(|peer| peer.name), lasting)
        }
        Err(_) => {
            let peer = peers.get(&host.parse()?)?;
            let lasting = peer.lasting();
            (Some(peer.name), lasting)
        }
    };
    let registry = tunnels(config).registry().clone();
    let hop = registry.find(&fingerprint.to_string())?;
    if name.is_none() && hop.is_none() {
        return Err(Error::NoHop(host.to_owned()));
    }
    if let Some(name) = name.as_ref().filter(|_| !now) {
        let migrations = going_to(config, name, hop.as_ref())?;
        if !migrations.is_empty() {
            return Err(Error::RevokeUnsettled {
                host: name.clone(),
                migrations,
            });
        }
    }
    if let Some(name) = &name {
        peers.remove(name)?;
    }
    let introducers = peers
        .list()?
        .into_iter()
        .filter(|peer| peer.may(Permission::Introduce))
        .map(|peer| peer.name)
        .collect();
    let mut revoked = Revoked {
        name,
        fingerprint,
        hop: Hopless::None,
        flows: Vec::new(),
        migrations: Vec::new(),
        forwardings: Vec::new(),
        invitations: 0,
        introducers,
        leftovers: Vec::new(),
    };
    // The key is gone already, which is what matters most; so the rest is told, not failed with.
    let withdrawn =
        Invites::open(&config.state_dir, &config.limits).and_then(|all| all.withdraw_all());
    match withdrawn {
        Ok(withdrawn) => revoked.invitations = withdrawn,
        Err(error) => revoked.leftovers.push(Leftover {
            effect: "open invitations".to_owned(),
            failure: Error::from(error).full(),
        }),
    }
    if let Some(hop) = hop {
        revoked.hop = Hopless::Kept;
        if let Err(error) = leave(config, &hop, now, &mut revoked).await {
            revoked.leftovers.push(Leftover {
                effect: format!("the tunnel {}", hop.spec.interface),
                failure: error.full(),
            });
        }
    }
    Ok(revoked)
}

/// Ends what goes through a hop, and the hop, as far as that is wanted.
async fn leave(config: &Config, hop: &Hop, now: bool, revoked: &mut Revoked) -> Result<()> {
    let id = hop.spec.hop;
    for carried in forwarding::forwardings(config)? {
        if carried.hops().contains(&id) {
            forwarding::without(config, &carried, id).await?;
            revoked.forwardings.push(carried.name);
        }
    }
    let under_way = under_way(config)?;
    revoked.migrations = hop.users.intersection(&under_way).cloned().collect();
    let table = Table::open(&Namespace::current()?)?;
    let entries = table.dump(Family::Both).await?;
    let through: Vec<&Entry> = entries.iter().filter(|it| it.mark.uses(id)).collect();
    revoked.flows = through.iter().map(|entry| describe(entry, id)).collect();
    let needed = !through.is_empty() || !revoked.migrations.is_empty();
    if needed && !now {
        return Ok(());
    }
    // The connections first: a mark that outlives its hop would lead into the next one of that number.
    let ended = through.iter().map(|entry| entry.original).collect();
    all_unless_gone(table.delete_all(ended).await?)?;
    tunnels(config).down(&hop.spec).await?;
    steer::remove(id).await?;
    alias::forget_unused(&table.dump(Family::Both).await?)?;
    revoked.hop = Hopless::Down;
    Ok(())
}

/// A connection by both its ends, and which of its directions take the hop.
fn describe(entry: &Entry, hop: HopId) -> String {
    let tuple = &entry.original;
    let way = |direction| entry.mark.hop(direction) == Some(hop);
    let which = match (way(Direction::Original), way(Direction::Reply)) {
        (true, true) => "both ways",
        (true, false) => "from the first",
        _ => "to the first",
    };
    format!("{tuple} ({which})")
}

/// The migrations from this host to a peer that have not ended.
fn going_to(config: &Config, name: &PeerName, hop: Option<&Hop>) -> Result<Vec<String>> {
    let mut migrations = Vec::new();
    for path in left_behind(&config.outgoing_dir())? {
        let number = number_of(&path);
        let goes_there = match Journal::open(&path) {
            Ok(journal) => journal.effects().iter().any(|effect| {
                matches!(effect, Effect::Destination { peer, .. } if peer == name.as_str())
            }),
            // Its process is at work; before it asks another host for anything, it takes a hop.
            Err(JournalError::InUse { .. }) => hop.is_some_and(|hop| hop.users.contains(&number)),
            Err(error) => return Err(error.into()),
        };
        if goes_there {
            migrations.push(number);
        }
    }
    Ok(migrations)
}
