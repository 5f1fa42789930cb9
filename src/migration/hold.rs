//! The container's packets begin to wait in the kernel.
//!
//! Everything that the downtime will change on this host is written into the journal here, with one
//! sync, before the first packet waits: the disk has no part in the downtime.
//!
//! A container without an address has no packets: none wait, and its silence needs no fence.

use std::path::Path;
use std::time::Instant;

use super::{Asked, Effect, Migration, home};
use crate::conntrack::Fence;
use crate::conntrack::hold::{HeldPorts, Hold, HoldSpec, PortProtocol};
use crate::criu::Freezer;
use crate::podman::{Container, PublishedPort};
use crate::{Error, Result};

pub(super) async fn hold(migration: &mut Migration<'_>) -> Result<()> {
    let begun = Instant::now();
    if migration.comes_home {
        home::hold_there(migration).await?;
    }
    let container = &migration.preflight.container;
    let hop = migration.hop()?;
    let addresses: Vec<_> = container.addresses().collect();
    let on_a_network = !addresses.is_empty();
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
    let fence = on_a_network.then(|| Fence {
        container: container.id.clone(),
        addresses: addresses.clone(),
        ports: spec.ports.clone(),
    });
    let destination = Effect::Destination {
        peer: migration.request.to.clone(),
        migration: migration.id.clone(),
        asked: Asked::Restore,
    };
    // Undone from the last to the first: the destination gives up its copy before anything here
    // moves, and the container may speak before it moves, or its first words would be lost.
    let mut effects = Vec::new();
    if fence.is_some() {
        effects.push(Effect::Hold { spec: spec.clone() });
    }
    effects.push(Effect::Frozen {
        freezer: freezer.clone(),
    });
    effects.extend(fence.clone().map(|fence| Effect::Fenced { fence }));
    effects.extend([
        Effect::Steered { addresses, hop },
        destination,
        // Done last if all goes well, and first if a crash has to be finished: while it is fenced.
        Effect::Forget {
            container: container.id.clone(),
            keep_volumes: migration.request.keep_volumes,
        },
    ]);
    migration.journal.will(effects)?;
    if let Some(fence) = &fence {
        fence.prepare().await?;
    }
    migration.freezer = Some(freezer);
    migration.fence = fence;
    migration.held_since = Some(Instant::now());
    if on_a_network {
        let hold = Hold::start(spec).await?;
        migration.held_since = Some(hold.since());
        migration.hands.hold = Some(hold);
    }
    if migration.comes_home {
        migration.held_since = Some(begun);
    }
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
