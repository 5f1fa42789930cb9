//! Shortening the paths of connections that came through this host and now pass it by.
//!
//! A container that had come from elsewhere has moved on. Where its older connections began, their
//! packets still go to this host and from here to the container. Each such host is told where the
//! container is now, and the container's host that it will be called; the two do the rest
//! ([`agent::paths`](crate::agent)). What cannot be shortened stays as it is, and works.

use std::collections::BTreeMap;

use hyper::Method;
use serde::Serialize;

use super::hop::{peer_of, tunnels};
use super::preflight::connect;
use super::{Migration, flows, forwarding, leave_idle_hops};
use crate::agent::Peer;
use crate::agent::protocol::{Expect, Forget, Introduction, Nothing, PathId, Shorten, Shortened};
use crate::conntrack::{Flow, Tuple};
use crate::tunnel::{Hop, HopId};
use crate::{Error, Result};

/// What became of the connections that came from one host.
#[derive(Debug, Clone, Serialize)]
pub struct Path {
    /// The host they come from.
    pub anchor: String,
    /// How many of the container's connections come from there.
    pub flows: usize,
    /// Why they go on through this host; nothing if they take the direct way now.
    pub kept: Option<String>,
}

/// Has the hosts in the middle forget the connections that went home past them.
pub(super) async fn forget_in_between(migration: &mut Migration<'_>) -> Result<()> {
    let through_here = migration.hop()?;
    let mut by_hop: BTreeMap<HopId, Vec<Tuple>> = BTreeMap::new();
    for flow in &migration.at_home {
        if let Some(from) = flow.came_by()
            && from != through_here
        {
            by_hop.entry(from).or_default().push(flow.seen);
        }
    }
    let config = &migration.request.config;
    for (hop, flows) in by_hop {
        let Some(hop) = tunnels(config).registry().get(hop)? else {
            continue;
        };
        let middle = anchor(migration, &hop)?;
        let forget = Forget {
            addresses: migration.preflight.container.addresses().collect(),
            flows,
        };
        let path = PathId::random().map_err(Error::Random)?;
        let Nothing {} = connect(config, &middle)
            .await?
            .call(Method::POST, &format!("/v1/paths/{path}/forget"), &forget)
            .await
            .map_err(Error::of_host(middle.name.as_str()))?;
    }
    Ok(())
}

/// Has every host that connections came from send them straight to the destination.
pub(super) async fn shorten(migration: &mut Migration<'_>) -> Result<()> {
    let addresses: Vec<_> = migration.preflight.container.addresses().collect();
    let through_here = migration.hop()?;
    let mut by_anchor: BTreeMap<HopId, Vec<Flow>> = BTreeMap::new();
    for flow in flows::of(&addresses).await? {
        if let Some(from) = flow.came_by()
            && flow.goes_by() == Some(through_here)
        {
            by_anchor.entry(from).or_default().push(flow);
        }
    }
    // Hosts whose new connections come through here have a way to shorten, too.
    let config = &migration.request.config;
    let container = migration.preflight.container.id.clone();
    if let Some(forwarding) = forwarding::of(config, &container)? {
        for hop in forwarding.from {
            by_anchor.entry(hop).or_default();
        }
    }
    for (hop, flows) in by_anchor {
        let Some(hop) = tunnels(&migration.request.config).registry().get(hop)? else {
            continue;
        };
        let anchor = anchor(migration, &hop);
        let name = match &anchor {
            Ok(peer) => peer.name.to_string(),
            Err(_) => hop.peer.clone(),
        };
        let kept = if migration.request.keep_chain {
            Some("asked to keep the chain".to_owned())
        } else {
            let done = match anchor {
                Ok(anchor) => one(migration, &anchor, &flows).await,
                Err(error) => Err(error),
            };
            done.err().map(|error| {
                tracing::warn!(anchor = name, %error, "connections go on through this host");
                error.full()
            })
        };
        migration.paths.push(Path {
            anchor: name,
            flows: flows.len(),
            kept,
        });
    }
    // Hops that no connection needs would only be in the way.
    leave_idle_hops(&migration.request.config).await.map(|_| ())
}

/// The host at the other end of a hop.
fn anchor(migration: &Migration<'_>, hop: &Hop) -> Result<Peer> {
    peer_of(&migration.request.config, hop)?.ok_or_else(|| Error::NoHop(hop.peer.clone()))
}

fn introduction(peer: &Peer) -> Result<Introduction> {
    Ok(Introduction {
        name: peer.name.clone(),
        fingerprint: peer.fingerprint,
        address: peer
            .address
            .clone()
            .ok_or_else(|| Error::NoAddress(peer.name.clone()))?,
    })
}

async fn one(migration: &mut Migration<'_>, anchor: &Peer, passing: &[Flow]) -> Result<()> {
    let config = migration.request.config.clone();
    let addresses: Vec<_> = migration.preflight.container.addresses().collect();
    let path = PathId::random().map_err(Error::Random)?;
    let destination = &migration.peer;
    let expect = Expect {
        addresses: addresses.clone(),
        anchor: introduction(anchor)?,
    };
    let mut there = connect(&config, destination).await?;
    let Nothing {} = there
        .call(Method::POST, &format!("/v1/paths/{path}/expect"), &expect)
        .await
        .map_err(Error::of_host(destination.name.as_str()))?;
    let container = &migration.preflight.container.id;
    let shorten = Shorten {
        container: container.clone(),
        addresses,
        to: introduction(destination)?,
    };
    let mut there = connect(&config, anchor).await?;
    let Shortened { flows } = there
        .call(Method::POST, &format!("/v1/paths/{path}/shorten"), &shorten)
        .await
        .map_err(Error::of_host(anchor.name.as_str()))?;
    tracing::debug!(anchor = %anchor.name, flows, "they take the direct way");
    flows::forget(passing).await?;
    forwarding::no_more_from(&config, container, &anchor.lasting().to_string()).await
}
