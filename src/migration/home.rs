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
//! hop arrives at a container that still runs, and then everything stands still.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::Duration;

use hyper::Method;

use super::flows;
use crate::agent::Connection;
use crate::agent::protocol::{MigrationId, Nothing};
use crate::conntrack::{Flow, Tuple};
use crate::tunnel::HopId;
use crate::{Error, Result};

/// How long packets may be on their way through a hop at most: a hundred times what it takes where
/// the hosts are near, and more than the round trip of a continent.
pub(crate) const ON_ITS_WAY: Duration = Duration::from_millis(20);

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

/// Has the destination hold what comes for the container on the connections that it knows, and waits
/// until what it had let pass before has arrived here.
pub(super) async fn hold_there(
    destination: &mut Connection,
    migration: &MigrationId,
    name: &str,
) -> Result<()> {
    let path = format!("/v1/migrations/{migration}/hold");
    let Nothing {} = destination
        .call(Method::POST, &path, &Nothing {})
        .await
        .map_err(Error::of_host(name))?;
    tokio::time::sleep(ON_ITS_WAY).await;
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
