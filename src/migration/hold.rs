//! The container's packets begin to wait in the kernel.
//!
//! Everything that the downtime will change on this host is written into the journal here, with one
//! sync, before the first packet waits: the disk has no part in the downtime.

use std::path::Path;

use super::{Asked, Effect, Migration};
use crate::conntrack::Fence;
use crate::conntrack::hold::{HeldPorts, Hold, HoldSpec, PortProtocol};
use crate::criu::Freezer;
use crate::podman::{Container, PublishedPort};
use crate::{Error, Result};

pub(super) async fn hold(migration: &mut Migration<'_>) -> Result<()> {
    let container = &migration.preflight.container;
    let hop = migration.hop()?;
    let addresses: Vec<_> = container.addresses().collect();
    let spec = HoldSpec {
        ports: container.ports.iter().filter_map(held_ports).collect(),
        hop: Some(hop),
        bound: migration.request.config.hold_packets,
        ..HoldSpec::new(queue(container)?, addresses.clone())
    };
    let freezer = Freezer::of(
        container.pid.ok_or(Error::OutOfOrder("process"))?,
        Path::new("/"),
    )?;
    let fence = Fence {
        container: container.id.clone(),
        addresses: addresses.clone(),
    };
    let destination = Effect::Destination {
        peer: migration.request.to.clone(),
        migration: migration.id.clone(),
        asked: Asked::Restore,
    };
    // Undone from the last to the first: the destination gives up its copy before anything here moves.
    migration.journal.will([
        Effect::Hold { spec: spec.clone() },
        Effect::Fenced {
            fence: fence.clone(),
        },
        Effect::Frozen {
            freezer: freezer.clone(),
        },
        Effect::Steered { addresses, hop },
        destination,
    ])?;
    fence.prepare().await?;
    migration.freezer = Some(freezer);
    migration.fence = Some(fence);
    let hold = Hold::start(spec).await?;
    migration.held_since = Some(hold.since());
    migration.hands.hold = Some(hold);
    Ok(())
}

/// A netfilter queue that belongs to this container's migration.
///
/// Two containers that move at the same time must not share one, and the low numbers are those that
/// other programs take. The kernel refuses a queue that is taken all the same.
fn queue(container: &Container) -> Result<u16> {
    const FIRST: u32 = 0x6c00;
    const QUEUES: u32 = 0x1000;
    let pid = container.pid.ok_or(Error::OutOfOrder("process"))?;
    u16::try_from(FIRST + pid % QUEUES).map_err(|_| Error::OutOfOrder("queue"))
}

/// The ports at which new connections wait; those of other protocols have none.
fn held_ports(port: &PublishedPort) -> Option<HeldPorts> {
    let protocol = match port.protocol.as_str() {
        "tcp" => PortProtocol::Tcp,
        "udp" => PortProtocol::Udp,
        _ => return None,
    };
    let last = port.host_port.saturating_add(port.range.saturating_sub(1));
    Some(HeldPorts {
        protocol,
        address: port.host_ip,
        first: port.host_port,
        last,
    })
}
