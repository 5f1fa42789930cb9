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

/// Points those of `arriving` at this host again that it has sent away, and returns which they are,
/// by their places in the list.
pub(crate) async fn welcome(addresses: &[IpAddr], arriving: &[Flow]) -> Result<Vec<usize>> {
    let away: HashMap<Tuple, Flow> = flows::of(addresses)
        .await?
        .into_iter()
        .filter(|flow| flow.goes_by().is_some())
        .map(|flow| (flow.seen, flow))
        .collect();
    let (mut places, mut marks) = (Vec::new(), Vec::new());
    for (place, flow) in arriving.iter().enumerate() {
        if let Some(known) = away.get(&flow.seen) {
            places.push(place);
            marks.push(known.steered(None));
        }
    }
    flows::mark_all(marks).await?;
    Ok(places)
}

/// Undoes [`welcome`]: what ends at this host goes after the container again.
///
/// Nothing but connections that were sent away can be meant. While the container is elsewhere, those
/// that are not are the ones that were entered for its arrival; they are deleted before.
pub(crate) async fn send_away(addresses: &[IpAddr], hop: HopId) -> Result<()> {
    let flows = flows::of(addresses).await?;
    let left = flows.iter().filter(|flow| flow.goes_by().is_none());
    flows::mark_all(left.map(|flow| flow.steered(Some(hop))).collect()).await
}

/// At the destination, which lets nothing more pass for the container: sends a mark after what it has let
/// pass, if all of that went into this hop. Says whether it did.
pub(crate) async fn mark_end(
    config: &Config,
    addresses: &[IpAddr],
    hop: HopId,
    migration: &MigrationId,
) -> Result<bool> {
    let flows = flows::of(addresses).await?;
    if !flows.iter().filter_map(Flow::goes_by).all(|by| by == hop) {
        return Ok(false);
    }
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
        return Ok(false);
    }
    Ok(true)
}

/// Has the destination hold what comes for the container on the connections that it knows, and waits
/// until what it had let pass before has arrived here.
///
/// What comes later meets the hold of this host, is let go when the container is elsewhere, and is lost.
pub(super) async fn hold_there(
    config: &Config,
    destination: &mut Connection,
    migration: &MigrationId,
    hop: HopId,
    name: &str,
) -> Result<()> {
    let path = format!("/v1/migrations/{migration}/hold");
    // Where the kernel has no such sockets (CONFIG_PACKET), it is waited for as long as it takes as a rule.
    let last = tunnels(config)
        .await_mark(hop, migration.as_str())
        .inspect_err(|error| tracing::warn!(%error, "it cannot be seen when the hop has run empty"))
        .ok();
    let Held { marked } = destination
        .call(Method::POST, &path, &Nothing {})
        .await
        .map_err(Error::of_host(name))?;
    match last.filter(|_| marked) {
        None => tokio::time::sleep(ON_ITS_WAY).await,
        Some(last) => {
            if !last.came(config.in_flight_timeout).await {
                tracing::warn!("what was on its way through the tunnel may come too late");
            }
        }
    }
    Ok(())
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
