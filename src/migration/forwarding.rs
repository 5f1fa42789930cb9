//! New connections that go after a container: what this host remembers of it, and who is told.
//!
//! A migration with `--forward-new` leaves a record at the source: new connections to the container's
//! published ports go into the hop. One at the destination says that they may come out of it. If the
//! container moves on, what comes out of that hop goes on into the next, asked for or not. The records
//! lie beside those of hops, and like the rules outlive agents but no reboot. A hop has a user for each
//! container that is forwarded through it, so it stays while there is no connection.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use hyper::Method;

use super::effect::Effect;
use super::hold::held_ports;
use super::hop::{peer_of, tunnels};
use super::journal::Journal;
use super::preflight::connect;
use super::undo::leave_hop;
use crate::agent::protocol::{MigrationId, Nothing};
use crate::conntrack::forward::{ForwardedPorts, Forwarding, Onward};
use crate::podman::{Container, ContainerId, Network};
use crate::tunnel::HopId;
use crate::{Config, Error, Result};

/// The largest record that is read, in bytes.
const LARGEST: u64 = 1 << 20;

/// The name under which a hop is kept for a container.
fn user(container: &ContainerId) -> String {
    format!("forward-{}", container.short())
}

fn directory(config: &Config) -> PathBuf {
    config.run_dir.join("forwards")
}

fn path(config: &Config, container: &ContainerId) -> PathBuf {
    directory(config).join(format!("{container}.json"))
}

/// Everything that this host forwards, or lets in because another host does.
///
/// # Errors
/// When the records cannot be read.
pub fn forwardings(config: &Config) -> Result<Vec<Forwarding>> {
    let directory = directory(config);
    let files = match std::fs::read_dir(&directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        files => files.map_err(Error::file("list", &directory))?,
    };
    let mut all = Vec::new();
    for file in files {
        let path = file.map_err(Error::file("list", &directory))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            all.extend(read(&path)?);
        }
    }
    Ok(all)
}

fn read(path: &PathBuf) -> Result<Option<Forwarding>> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::file("read", path)(error)),
        Ok(about) if about.len() > LARGEST => {
            let error = std::io::Error::from(std::io::ErrorKind::FileTooLarge);
            return Err(Error::file("read", path)(error));
        }
        Ok(_) => {}
    }
    let text = std::fs::read(path).map_err(Error::file("read", path))?;
    let forwarding = serde_json::from_slice(&text).map_err(std::io::Error::from);
    Ok(Some(forwarding.map_err(Error::file("read", path))?))
}

/// What this host does for new connections of a container.
pub(crate) fn of(config: &Config, container: &ContainerId) -> Result<Option<Forwarding>> {
    read(&path(config, container))
}

/// Writes a record, whole or not at all, and keeps the hops that it needs.
fn write(config: &Config, forwarding: &Forwarding) -> Result<()> {
    let tunnels = tunnels(config);
    for hop in tunnels.registry().list()? {
        if forwarding.hops().contains(&hop.spec.hop) {
            tunnels.acquire(&hop.peer, &user(&forwarding.container))?;
        }
    }
    let (directory, path) = (directory(config), path(config, &forwarding.container));
    std::fs::create_dir_all(&directory).map_err(Error::file("make", &directory))?;
    let text = serde_json::to_vec(forwarding).map_err(std::io::Error::from);
    let text = text.map_err(Error::file("write", &path))?;
    let new = path.with_extension("new");
    std::fs::write(&new, text).map_err(Error::file("write", &new))?;
    std::fs::rename(&new, &path).map_err(Error::file("write", &path))
}

/// Takes the container's share off the hops that are not needed for it any more. Connections that go
/// through them inherit it, and give it back when they have ended.
fn leave_hops(config: &Config, container: &ContainerId, needed: &BTreeSet<HopId>) -> Result<()> {
    let tunnels = tunnels(config);
    let user = user(container);
    for hop in tunnels.registry().list()? {
        if hop.users.contains(&user) && !needed.contains(&hop.spec.hop) {
            let heir = MigrationId::random().map_err(Error::Random)?;
            tunnels.acquire(&hop.peer, heir.as_str())?;
            tunnels.registry().release(hop.spec.hop, &user)?;
        }
    }
    Ok(())
}

/// Makes this what the host does for new connections of the container.
pub(crate) async fn set(config: &Config, forwarding: &Forwarding) -> Result<()> {
    if forwarding.is_idle() {
        return forget(config, &forwarding.container).await;
    }
    write(config, forwarding)?;
    forwarding.install().await?;
    leave_hops(config, &forwarding.container, &forwarding.hops())
}

/// Makes this what the host does, if it is anything, and writes down first what it did before.
pub(crate) async fn change(
    config: &Config,
    journal: &mut Journal,
    after: Option<Forwarding>,
) -> Result<()> {
    let Some(after) = after else {
        return Ok(());
    };
    journal.will([Effect::Forwarding {
        container: after.container.clone(),
        before: of(config, &after.container)?,
    }])?;
    set(config, &after).await
}

/// Does nothing more for new connections of the container. Those that have begun go on.
pub(crate) async fn forget(config: &Config, container: &ContainerId) -> Result<()> {
    erase(config, container).await?;
    leave_hops(config, container, &BTreeSet::new())
}

/// Removes the rules and the record.
async fn erase(config: &Config, container: &ContainerId) -> Result<()> {
    if let Some(forwarding) = of(config, container)? {
        forwarding.remove().await?;
    }
    let path = path(config, container);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::file("remove", &path)(error))
        }
        _ => Ok(()),
    }
}

/// Undoes [`set`], [`prepare`] and [`forget`]: makes it as it was before.
pub(crate) async fn restore(
    config: &Config,
    container: &ContainerId,
    before: Option<&Forwarding>,
) -> Result<()> {
    match before {
        Some(before) => set(config, before).await,
        None => {
            erase(config, container).await?;
            // No connection has inherited anything: whatever was prepared was not used.
            leave_hop(config, &user(container)).await
        }
    }
}

/// What the source does after the container has left by this hop: with `own`, for new connections
/// to its own ports too. Nothing if no new connection is to be carried.
pub(super) fn after_leaving(
    config: &Config,
    container: &Container,
    networks: &[Network],
    hop: HopId,
    own: bool,
) -> Result<Option<Forwarding>> {
    let before = of(config, &container.id)?;
    let mut from = before.map(|before| before.from).unwrap_or_default();
    // What comes from where the container goes needs nobody in between.
    from.remove(&hop);
    if from.is_empty() && !own {
        return Ok(None);
    }
    let connection = tunnels(config)
        .registry()
        .get(hop)?
        .and_then(|hop| hop.connection);
    let connection = connection.ok_or(Error::OutOfOrder("hop"))?;
    let mut hidden = vec![(IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8)];
    let subnets = networks.iter().flat_map(|network| &network.subnets);
    hidden.extend(subnets.map(|subnet| (subnet.subnet.ip(), subnet.subnet.prefix())));
    // A client over there has an address that its kernel would not send into a hop.
    hidden.push(whole(connection.endpoint.ip()));
    let ends = connection.v4.into_iter().chain(connection.v6);
    let to = Onward {
        hop,
        own,
        tunnel: ends.map(|end| end.local).collect(),
        hidden,
    };
    Ok(Some(Forwarding {
        to: Some(to),
        from,
        ..blank(container)
    }))
}

/// What the destination does: new connections for the container may come out of this hop.
pub(crate) fn after_arrival(
    config: &Config,
    container: &Container,
    hop: HopId,
) -> Result<Forwarding> {
    let before = of(config, &container.id)?;
    let mut forwarding = Forwarding {
        // Until it runs, and has no part in what is forwarded from here.
        to: before.as_ref().and_then(|before| before.to.clone()),
        from: before.map(|before| before.from).unwrap_or_default(),
        ..blank(container)
    };
    forwarding.from.insert(hop);
    Ok(forwarding)
}

/// What the anchor does when its way to the container becomes shorter: new connections that went
/// into one hop go into another. Nothing if none did.
pub(crate) fn redirected(
    config: &Config,
    container: &ContainerId,
    from: HopId,
    to: HopId,
) -> Result<Option<Forwarding>> {
    let Some(before) = of(config, container)? else {
        return Ok(None);
    };
    let Some(onward) = before.to.clone().filter(|onward| onward.hop == from) else {
        return Ok(None);
    };
    let registry = tunnels(config).registry().clone();
    let other_end = |hop: Option<crate::tunnel::Hop>| {
        hop.and_then(|hop| hop.connection)
            .map(|connection| whole(connection.endpoint.ip()))
    };
    let connection = registry.get(to)?.and_then(|hop| hop.connection);
    let connection = connection.ok_or(Error::OutOfOrder("hop"))?;
    let mut hidden = onward.hidden;
    let old_end = other_end(registry.get(from)?);
    hidden.retain(|network| Some(*network) != old_end);
    hidden.push(whole(connection.endpoint.ip()));
    let ends = connection.v4.into_iter().chain(connection.v6);
    Ok(Some(Forwarding {
        to: Some(Onward {
            hop: to,
            own: onward.own,
            tunnel: ends.map(|end| end.local).collect(),
            hidden,
        }),
        ..before
    }))
}

/// What the container's host does when an anchor's way to it becomes shorter: what may come out of
/// one hop may come out of the other too. Nothing if nothing may.
pub(crate) fn admitted(
    config: &Config,
    container: &ContainerId,
    old: HopId,
    new: HopId,
) -> Result<Option<Forwarding>> {
    let before = of(config, container)?;
    Ok(before
        .filter(|before| before.from.contains(&old))
        .map(|mut before| {
            before.from.insert(new);
            before
        }))
}

/// An address as a network of its own: with the length of its prefix.
fn whole(address: IpAddr) -> (IpAddr, u8) {
    (address, if address.is_ipv6() { 128 } else { 32 })
}

/// What the host does that the container has come to: it is not elsewhere any more. Nothing if there
/// is nothing to change.
pub(crate) fn at_home(config: &Config, container: &ContainerId) -> Result<Option<Forwarding>> {
    let before = of(config, container)?;
    Ok(before
        .filter(|before| before.to.is_some())
        .map(|before| Forwarding { to: None, ..before }))
}

/// Whether new connections for the container come here from other hosts than the one at the other
/// end of this hop.
pub(super) fn comes_from_others(
    config: &Config,
    container: &Container,
    hop: HopId,
) -> Result<bool> {
    let forwarding = of(config, &container.id)?;
    Ok(forwarding.is_some_and(|forwarding| forwarding.from.iter().any(|from| *from != hop)))
}

/// Puts into force what a migration had only prepared when its process died.
pub(super) async fn complete(config: &Config, container: &ContainerId) -> Result<()> {
    match of(config, container)? {
        Some(forwarding) => set(config, &forwarding).await,
        None => Ok(()),
    }
}

/// Nothing is done for this container yet.
fn blank(container: &Container) -> Forwarding {
    let ports = container.ports.iter().filter_map(|port| {
        Some(ForwardedPorts {
            host: held_ports(port)?,
            inside: port.container_port,
        })
    });
    Forwarding {
        container: container.id.clone(),
        name: container.name.clone(),
        addresses: container.addresses().collect(),
        ports: ports.collect(),
        from: BTreeSet::new(),
        to: None,
    }
}

/// Makes ready what is switched on when the container is let go: the record, and the rules beside
/// those that there are.
pub(super) async fn prepare(config: &Config, forwarding: &Forwarding) -> Result<()> {
    write(config, forwarding)?;
    Ok(forwarding.prepare().await?)
}

/// Stops forwarding new connections of a container, or of all; connections that have begun go on.
/// Returns the names of the containers, and what could not be told to the next hosts.
///
/// # Errors
/// When there is nothing of that name, or rules or records cannot be removed.
pub async fn stop_forwarding(
    config: &Config,
    only: Option<&str>,
) -> Result<(Vec<String>, Vec<Error>)> {
    super::must_be_root()?;
    let mut stopped = Vec::new();
    let mut untold = Vec::new();
    for forwarding in forwardings(config)? {
        let named = |name: &str| {
            forwarding.name == name
                || (name.len() >= 3 && forwarding.container.as_str().starts_with(name))
        };
        if only.is_none_or(named) {
            forget(config, &forwarding.container).await?;
            untold.extend(tell_next(config, &forwarding).await.err());
            stopped.push(forwarding.name);
        }
    }
    match only {
        Some(name) if stopped.is_empty() => Err(Error::NotForwarded(name.to_owned())),
        _ => Ok((stopped, untold)),
    }
}

/// Carries nothing into this hop any more, and takes nothing that comes out of it.
pub(super) async fn without(config: &Config, forwarding: &Forwarding, hop: HopId) -> Result<()> {
    let mut after = forwarding.clone();
    after.from.remove(&hop);
    after.to = after.to.filter(|to| to.hop != hop);
    set(config, &after).await
}

/// The host before this one carries no more new connections of a container.
pub(crate) async fn no_more_from(
    config: &Config,
    container: &ContainerId,
    peer: &str,
) -> Result<()> {
    let Some(mut forwarding) = of(config, container)? else {
        return Ok(());
    };
    if let Some(hop) = tunnels(config).registry().find(peer)? {
        forwarding.from.remove(&hop.spec.hop);
    }
    set(config, &forwarding).await?;
    if forwarding.is_idle() {
        tell_next(config, &forwarding).await?;
    }
    Ok(())
}

/// Tells the host that new connections went on to that none will come.
async fn tell_next(config: &Config, forwarding: &Forwarding) -> Result<()> {
    let Some(to) = &forwarding.to else {
        return Ok(());
    };
    let Some(hop) = tunnels(config).registry().get(to.hop)? else {
        return Ok(());
    };
    let Some(peer) = peer_of(config, &hop)? else {
        return Ok(());
    };
    let path = format!("/v1/forwardings/{}", forwarding.container);
    let Nothing {} = connect(config, &peer)
        .await?
        .call(Method::DELETE, &path, &Nothing {})
        .await
        .map_err(Error::of_host(peer.name.as_str()))?;
    Ok(())
}
