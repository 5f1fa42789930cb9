//! The container's packets begin to wait in the kernel.
//!
//! Everything that the downtime will change on this host is written into the journal here, with one
//! sync, before the first packet waits: the disk has no part in the downtime.
//!
//! Newcomers wait first, and connections that are being opened get their time to become
//! established; then everybody waits, and what has arrived is read. See [`drain`](super::drain).
//!
//! A container without an address has no packets: none wait, and its silence needs no fence.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use hyper::Method;

use super::drain::Drainage;
use super::{Asked, Effect, Migration, Part, flows, forwarding, home};
use crate::agent::protocol::{Nothing, Stage, Status};
use crate::conntrack::Fence;
use crate::conntrack::hold::{HeldPorts, HoldSpec, PortProtocol, Reserved};
use crate::criu::Freezer;
use crate::netlink::Namespace;
use crate::podman::PublishedPort;
use crate::{Error, Result};

pub(super) async fn hold(migration: &mut Migration<'_>) -> Result<()> {
    still_ready(migration).await?;
    let container = &migration.preflight.container;
    let config = &migration.request.config;
    let hop = migration.hop()?;
    let pid = container.pid.ok_or(Error::OutOfOrder("process"))?;
    let addresses: Vec<_> = container.addresses().collect();
    let on_a_network = !addresses.is_empty();
    // Bound before it is written down: whoever else migrates now gets another one.
    let reserved = on_a_network.then(Reserved::first_free).transpose()?;
    let ports: Vec<_> = container.ports.iter().filter_map(held_ports).collect();
    let tied = flows::live(container).await?;
    let tied = tied.iter().filter(|flow| flow.is_tied_to_interface());
    let masqueraded: BTreeSet<_> = tied.map(|flow| flow.entry.original.source).collect();
    let spec = reserved.as_ref().map(|reserved| HoldSpec {
        ports: ports.clone(),
        masqueraded: masqueraded.iter().copied().collect(),
        hop: Some(hop),
        packets: config.hold_packets,
        bytes: config.hold_bytes,
        ..HoldSpec::new(reserved.queue(), addresses.clone())
    });
    let freezer = Freezer::of(pid, Path::new("/"))?;
    // All that is frozen is what is in there.
    freezer.gather(pid, Path::new("/"))?;
    let own = migration.request.forward_new;
    let networks = &migration.preflight.offer.networks;
    let forwarding = forwarding::after_leaving(config, container, networks, hop, own)?;
    let fence = on_a_network.then(|| Fence {
        container: container.id.clone(),
        addresses: addresses.clone(),
        // What is carried on is not refused.
        ports: if own { Vec::new() } else { ports },
    });
    let destination = Effect::Destination {
        peer: migration.request.to.clone(),
        migration: migration.id.clone(),
        asked: Asked::Restore,
    };
    // Undone from the last to the first: the destination gives up its copy before anything here
    // moves, and the container may speak before it moves, or its first words would be lost.
    let mut effects = Vec::new();
    effects.extend(spec.clone().map(|spec| Effect::Hold { spec }));
    effects.push(Effect::Frozen {
        freezer: freezer.clone(),
    });
    effects.extend(fence.clone().map(|fence| Effect::Fenced { fence }));
    let before = forwarding::of(config, &container.id)?;
    if before.is_some() || forwarding.is_some() {
        effects.push(Effect::Forwarding {
            container: container.id.clone(),
            before,
        });
    }
    effects.extend([
        Effect::Steered { addresses, hop },
        destination,
        // Done last if all goes well, and first if a crash has to be finished: while it is fenced.
        Effect::Forget {
            container: container.id.clone(),
            keep_volumes: migration.request.keep_volumes,
        },
    ]);
    let mut drainage = Drainage::of(pid, config.drain_timeout)?;
    migration.journal.will(effects)?;
    if let Some(fence) = &fence {
        fence.prepare().await?;
    }
    if let Some(forwarding) = &forwarding {
        forwarding::prepare(config, forwarding).await?;
    }
    migration.forwarding = forwarding;
    migration.freezer = Some(freezer);
    migration.fence = fence;
    if let (Some(reserved), Some(spec)) = (reserved, spec) {
        let hold = reserved.prepare(spec).await?;
        migration.hands.namespace = Some(Namespace::of_pid(pid)?);
        migration.hands.holds.push(hold);
        let hold = migration
            .hands
            .holds
            .last_mut()
            .ok_or(Error::OutOfOrder("hold"))?;
        hold.hold_newcomers()?;
        drainage.opening().await?;
        let begun = match migration.comes_home {
            true => {
                let (connection, id) = (&mut migration.connection, &migration.id);
                home::hold_there(config, connection, id, hop, &migration.request.to).await?
            }
            false => Instant::now(),
        };
        hold.hold_all()?;
        migration.downtime.begin(begun);
    } else {
        migration.downtime.begin(Instant::now());
    }
    migration.drain = drainage.arrived().await?;
    migration.downtime.part(Part::Drain);
    Ok(())
}

/// Makes sure that the way to the destination is open, and that it knows of the migration: from here on
/// whatever goes wrong costs the container time.
async fn still_ready(migration: &mut Migration<'_>) -> Result<()> {
    let path = format!("/v1/migrations/{}", migration.id);
    let answer = migration
        .connection
        .call(Method::GET, &path, &Nothing {})
        .await;
    let Status { stage, .. } = answer.map_err(Error::of_host(&migration.request.to))?;
    if stage == Stage::Prepared {
        Ok(())
    } else {
        Err(Error::Forgotten(migration.request.to.clone()))
    }
}

/// The ports at which new connections wait; those of other protocols have none.
pub(super) fn held_ports(port: &PublishedPort) -> Option<HeldPorts> {
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
