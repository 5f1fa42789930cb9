//! What there is on this host: its containers, their connections, and the hops those take.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;

use crate::conntrack::{Direction, Family, Flow, Table};
use crate::migration::{find, must_be_root, peer_of, podman, tunnels};
use crate::netlink::Namespace;
use crate::podman::ContainerId;
use crate::tunnel::{Hop, HopId};
use crate::{Config, Result};

/// A container of this host.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// Its ID.
    pub id: ContainerId,
    /// Its name.
    pub name: String,
    /// What it is doing, in Podman's words.
    pub state: String,
    /// The name of its image.
    pub image_name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// How many connections it has.
    pub flows: usize,
    /// How many of them come through a hop, from a host that it was on before.
    pub through_hops: usize,
}

/// A connection of a container that is on this host, or was.
#[derive(Debug, Clone, Serialize)]
pub struct ListedFlow {
    /// The container's name; nothing if it is on another host by now.
    pub container: Option<String>,
    /// The connection.
    pub flow: Flow,
    /// The hosts at the other ends of its hops.
    pub hops: BTreeMap<HopId, String>,
}

/// The containers of this host.
///
/// # Errors
/// When this is not root, or Podman or the kernel cannot be asked.
pub async fn containers(config: &Config) -> Result<Vec<Listed>> {
    must_be_root()?;
    let podman = podman(config)?;
    let table = Table::open(&Namespace::current()?)?;
    let mut listed = Vec::new();
    for summary in podman.list(true).await? {
        let container = match podman.inspect(summary.id.as_str()).await {
            // Removed since it was listed.
            Err(error) if error.is_not_found() => continue,
            container => container?,
        };
        let addresses: Vec<IpAddr> = container.addresses().collect();
        let (mut flows, mut through_hops) = (0, 0);
        for address in &addresses {
            for entry in table.dump_container(*address).await? {
                flows += 1;
                through_hops += usize::from(entry.mark.is_steered());
            }
        }
        listed.push(Listed {
            id: summary.id,
            name: summary.name,
            state: summary.state,
            image_name: summary.image_name,
            addresses,
            flows,
            through_hops,
        });
    }
    Ok(listed)
}

/// The connections of this host's containers, and those that it passes on to where theirs are now.
///
/// # Errors
/// When this is not root, there is no such container, or Podman or the kernel cannot be asked.
pub async fn flows(config: &Config, only: Option<&str>) -> Result<Vec<ListedFlow>> {
    must_be_root()?;
    let podman = podman(config)?;
    let mut owners: BTreeMap<IpAddr, String> = BTreeMap::new();
    match only {
        Some(name) => {
            let container = find(&podman, name).await?;
            owners.extend(
                container
                    .addresses()
                    .map(|address| (address, container.name.clone())),
            );
        }
        None => {
            for summary in podman.list(false).await? {
                if let Ok(container) = podman.inspect(summary.id.as_str()).await {
                    owners.extend(
                        container
                            .addresses()
                            .map(|address| (address, container.name.clone())),
                    );
                }
            }
        }
    }
    let hops: BTreeMap<HopId, String> = tunnels(config)
        .registry()
        .list()?
        .into_iter()
        .map(|hop| (hop.spec.hop, host_of(config, &hop)))
        .collect();
    let table = Table::open(&Namespace::current()?)?;
    let mut listed = Vec::new();
    for entry in table.dump(Family::Both).await? {
        let owner = [entry.original.source, entry.reply.source]
            .into_iter()
            .find_map(|address| Some((address, owners.get(&address)?.clone())));
        let (address, container) = match owner {
            Some((address, name)) => (address, Some(name)),
            // The container has left. It is where the steered direction leads to.
            None if only.is_none() && entry.mark.is_steered() => {
                let inbound = entry.mark.hop(Direction::Original).is_some();
                (
                    if inbound {
                        entry.reply.source
                    } else {
                        entry.original.source
                    },
                    None,
                )
            }
            None => continue,
        };
        if let Some(flow) = entry.flow_of(address) {
            listed.push(ListedFlow {
                container,
                flow,
                hops: hops.clone(),
            });
        }
    }
    Ok(listed)
}

/// The name of the host at the other end, or its fingerprint.
fn host_of(config: &Config, hop: &Hop) -> String {
    let known = peer_of(config, hop).ok().flatten();
    known.map_or_else(|| hop.peer.clone(), |peer| peer.name.to_string())
}
