//! The container's flows are pointed at the destination, and what waited is let go.
//!
//! The marks are set early, while the container is being dumped: no packet reads them until it is
//! released, so that the release itself is all that is left to do when the destination says "running".

use std::time::Instant;

use super::{Migration, Part, check, flows, home};
use crate::Result;
use crate::conntrack::hold::{Pace, Rate, Released, To};
use crate::conntrack::{Flow, Table, alias};
use crate::netlink::Namespace;
use crate::podman::{Container, Network};
use crate::tunnel::HopId;

/// Reads a container's flows and points each at the hop.
///
/// The container must not move any more, or it could open another one.
pub(super) async fn mark(
    container: &Container,
    networks: &[Network],
    hop: HopId,
) -> Result<Vec<Flow>> {
    let subnets = check::subnets(networks);
    let mut flows = flows::live(container).await?;
    flows.retain(|flow| flow.keepable(&subnets).is_ok());
    // One that came by this very hop goes home, and does not come back here.
    let leaving: Vec<&Flow> = flows
        .iter()
        .filter(|flow| flow.came_by() != Some(hop))
        .collect();
    alias::Peers::of(leaving.iter().copied(), &subnets).remember()?;
    let (tied, free): (Vec<&Flow>, _) = leaving
        .into_iter()
        .partition(|flow| flow.is_tied_to_interface());
    let tied = tied.into_iter().map(|flow| {
        let (mark, mask) = flow.steering(Some(hop));
        (flow.entry.clone(), mark, mask)
    });
    let free = free.into_iter().map(|flow| flow.steered(Some(hop)));
    let table = Table::open(&Namespace::current()?)?;
    let mut outcomes = table.pin_all(tied.collect()).await?;
    outcomes.extend(table.set_mark_all(free.collect()).await?);
    flows::all_unless_gone(outcomes)?;
    Ok(flows)
}

pub(super) async fn steer(migration: &mut Migration<'_>) -> Result<()> {
    // The first packet that passes is the point of no return: what the world has heard of the copy
    // is never taken back.
    migration.let_go = true;
    // A container without an address has no packets.
    let hold = migration.hands.holds.pop();
    let here = async {
        match hold {
            Some(hold) => {
                let released = hold.release(To::Destination, Pace::Rate(Rate::default()));
                released.await.map(Some)
            }
            None => Ok(None),
        }
    };
    let (connection, id) = (&mut migration.connection, &migration.id);
    let comes_home = migration.comes_home;
    let there = async {
        match comes_home {
            true => home::release_there(connection, id).await,
            false => Ok(()),
        }
    };
    // Neither waits for the other: they are packets of different connections.
    let began = Instant::now();
    let (here, there) = futures::join!(here, there);
    // The first pass within a millisecond. What takes longer is that datagrams follow at a pace.
    let passed = here
        .as_ref()
        .ok()
        .and_then(Option::as_ref)
        .map(Released::began);
    migration
        .downtime
        .end(Part::Release, passed.unwrap_or(began));
    migration.note("letting packets go at the destination", there);
    match here {
        // What is left to do is removing the rules, which the destination need not wait for.
        Ok(released) => migration.released = released,
        Err(error) => migration.note("letting the packets go", Err(error.into())),
    }
    Ok(())
}
