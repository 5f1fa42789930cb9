//! Coming home: a container returns to a host that some of its connections never left.
//!
//! The anchor of a connection keeps its entry, translation and all, for as long as the connection
//! lives; while the container is elsewhere the entry's mark sends packets after it. When the
//! container comes back nothing has to be entered: the mark is cleared, and the connection is as if
//! the container had never been away, with no hop in its way.
//!
//! The packets of such connections wait *here*, at the destination, and not at the source like
//! others: from the source they would have to come back untranslated, past an entry that translates
//! them. So the destination begins to hold before the source does, what was on its way through the
//! hop arrives at a container that still runs, and then everything stands still. That it has arrived
//! shows a mark, which the destination sends last into the same hop ([`tunnel::marker`](crate::tunnel)).

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use hyper::Method;

use super::flows;
use super::hop::tunnels;
use crate::agent::Connection;
use crate::agent::protocol::{Held, MigrationId, Nothing};
use crate::conntrack::{Flow, Tuple};
use crate::netlink::Backlog;
use crate::tunnel::HopId;
use crate::{Config, Error, Result};

/// How long packets may be on their way through several hops, as a rule: a hundred times what it takes
/// where the hosts are near, and more than the round trip of a continent. Through one hop a mark follows
/// them ([`mark_end`]), and nothing has to be supposed.
pub(crate) const ON_ITS_WAY: Duration = Duration::from_millis(20);

/// How long to wait between two looks at what is under way within this host.
const LOOK: Duration = Duration::from_micros(500);

/// The hop by which connections of a container with these addresses leave this host, if there are
/// any: then they began here, or came through here, and this host is their home.
pub(crate) async fn came_from_here(addresses: &[IpAddr]) -> Result<Option<HopId>> {
    let flows = flows::of(addresses).await?;
    Ok(flows.iter().find_map(Flow::goes_by))
}

/// The connections of a container that this host has sent away, by what peers see of them.
#[derive(Debug, Default)]
pub(crate) struct Away(HashMap<Tuple, Flow>);

impl Away {
    /// Those of a container with these addresses. This takes as long as the kernel's whole table is large
    /// (3 ms for each direction of 262,144 buckets), so it is best done while something else is waited for.
    pub async fn of(addresses: &[IpAddr]) -> Result<Away> {
        let flows = flows::of(addresses).await?.into_iter();
        let away = flows.filter(|flow| flow.goes_by().is_some());
        Ok(Away(away.map(|flow| (flow.seen, flow)).collect()))
    }

    /// Whether all of them go by this hop.
    pub fn all_by(&self, hop: HopId) -> bool {
        self.0.values().all(|flow| flow.goes_by() == Some(hop))
    }

    /// Points those of `arriving` at this host again, and returns which they are, by their places in the list.
    pub async fn welcome(&self, arriving: &[Flow]) -> Result<Vec<usize>> {
        let (mut places, mut marks) = (Vec::new(), Vec::new());
        for (place, flow) in arriving.iter().enumerate() {
            if let Some(known) = self.0.get(&flow.seen) {
                places.push(place);
                marks.push(known.steered(None));
            }
        }
        flows::mark_all(marks).await?;
        Ok(places)
    }
}

/// Undoes [`Away::welcome`]: what ends at this host goes after the container again.
///
/// Nothing but connections that were sent away can be meant. While the container is elsewhere, those
/// that are not are the ones that were entered for its arrival; they are deleted before.
pub(crate) async fn send_away(addresses: &[IpAddr], hop: HopId) -> Result<()> {
    let flows = flows::of(addresses).await?;
    let left = flows.iter().filter(|flow| flow.goes_by().is_none());
    flows::mark_all(left.map(|flow| flow.steered(Some(hop))).collect()).await
}

/// At the destination, which lets nothing more pass for the container: sends a mark after what it has let
/// pass, all of which went into this hop. Says whether it did.
pub(crate) async fn mark_end(config: &Config, hop: HopId, migration: &MigrationId) -> bool {
    let long = config.in_flight_timeout;
    // What has passed the switch may not have reached the hop yet.
    let (mut under_way, began) = (Backlog::begin(), Instant::now());
    while !under_way.has_passed() && began.elapsed() < ON_ITS_WAY {
        tokio::time::sleep(LOOK).await;
    }
    let tunnels = tunnels(config);
    let sent = tunnels.send_mark(hop, migration.as_str(), long);
    if let Err(error) = sent.await {
        tracing::warn!(%error, "no mark follows what went into the hop");
        return false;
    }
    true
}

/// Has the destination hold what comes for the container on the connections that it knows, and waits
/// until what it had let pass before has arrived here. Returns since when it holds.
///
/// What comes later meets the hold of this host, is let go when the container is elsewhere, and is lost.
pub(super) async fn hold_there(
    config: &Config,
    destination: &mut Connection,
    migration: &MigrationId,
    hop: HopId,
    name: &str,
) -> Result<Instant> {
    let path = format!("/v1/migrations/{migration}/hold");
    // Where the kernel has no such sockets (CONFIG_PACKET), it is waited for as long as it takes as a rule.
    let last = tunnels(config)
        .await_mark(hop, migration.as_str())
        .inspect_err(|error| tracing::warn!(%error, "it cannot be seen when the hop has run empty"))
        .ok();
    let asked = Instant::now();
    let Held { marked, waited } = destination
        .call(Method::POST, &path, &Nothing {})
        .await
        .map_err(Error::of_host(name))?;
    let since = asked + asked.elapsed().saturating_sub(waited);
    match last.filter(|_| marked) {
        None => tokio::time::sleep(ON_ITS_WAY).await,
        Some(last) => {
            if !last.came(config.in_flight_timeout).await {
                tracing::warn!("what was on its way through the tunnel may come too late");
            }
        }
    }
    Ok(since)
}

/// Has the destination let its connections go.
pub(super) async fn release_there(
    destination: &mut Connection,
    migration: &MigrationId,
) -> Result<()> {
    let path = format!("/v1/migrations/{migration}/release");
    let Nothing {} = destination.call(Method::POST, &path, &Nothing {}).await?;
    Ok(())
}
