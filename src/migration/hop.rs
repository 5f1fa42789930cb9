//! Making a hop between two hosts: what each of them does, whatever the hop is for.
//!
//! One host asks and the other answers, over their agents' connection. The one that asks opens its
//! end and sends a [`Proposal`]; the other opens its own, lets the first one in and answers with its
//! own proposal. Both put the guard in place before they let the other in.

use std::net::{IpAddr, SocketAddr};

use hyper::Method;

use crate::agent::protocol::Nothing;
use crate::agent::{Connection, DEFAULT_PORT, Fingerprint, Peer, Peers};
use crate::conntrack::steer;
use crate::tunnel::{Hop, HopId, Proposal, Tunnels};
use crate::{Config, Result};

/// The tunnels of this host.
pub(crate) fn tunnels(config: &Config) -> Tunnels {
    Tunnels::new(config.tunnel_settings())
}

/// The host at the other end of a hop, if it is still known.
///
/// One that has only ever called has no address of its own. Its tunnel comes from where its agent most
/// likely is; whoever answers there has to have its key.
pub(crate) fn peer_of(config: &Config, hop: &Hop) -> Result<Option<Peer>> {
    let peers = Peers::open(&config.state_dir, &config.limits)?.list()?;
    let mut peers = peers.into_iter();
    let known = peers.find(|peer| peer.lasting().to_string() == hop.peer);
    Ok(known.map(|mut peer| {
        let at = hop
            .connection
            .as_ref()
            .map(|connection| connection.endpoint);
        peer.address = peer
            .address
            .or_else(|| at.map(|endpoint| SocketAddr::new(endpoint.ip(), DEFAULT_PORT).into()));
        peer
    }))
}

/// An end of a hop that nobody can use yet.
#[derive(Debug)]
pub(crate) struct Opened {
    pub hop: HopId,
    pub proposal: Proposal,
}

/// Opens this host's end of the hop to a peer, with `user` among those that need it.
///
/// Undone by the user's name, which belongs into the journal before: which hop it is, only taking it
/// tells.
pub(crate) async fn open(
    config: &Config,
    peer: &Fingerprint,
    user: &str,
    mtu: u16,
) -> Result<Opened> {
    let tunnels = tunnels(config);
    let (hop, _) = tunnels.acquire(&peer.to_string(), user)?;
    let hop = hop.spec.hop;
    let proposal = tunnels.open(hop, mtu).await?;
    Ok(Opened { hop, proposal })
}

/// Lets the other end in.
pub(crate) async fn connect(
    config: &Config,
    hop: HopId,
    theirs: &Proposal,
    address: IpAddr,
) -> Result<()> {
    // The guard first: from the moment the peer is let in, packets can come.
    steer::install(hop).await?;
    tunnels(config).connect(hop, theirs, address).await?;
    Ok(())
}

/// Makes sure, at the end that asks, that the hop carries packets of full size both ways. The other
/// end does its part when it is asked at `path`.
pub(crate) async fn verify(
    config: &Config,
    hop: HopId,
    connection: &mut Connection,
    path: &str,
) -> Result<()> {
    let tunnels = tunnels(config);
    let patience = config.handshake_timeout;
    tunnels.verify(hop, patience).await?;
    // A path may carry handshakes and yet swallow packets of full size.
    let Nothing {} = connection.call(Method::POST, path, &Nothing {}).await?;
    tunnels.verify_full_size(hop, patience).await?;
    Ok(())
}

/// The other end's part of [`verify`].
pub(crate) async fn answer_verify(config: &Config, hop: HopId) -> Result<()> {
    let tunnels = tunnels(config);
    let patience = config.handshake_timeout;
    tunnels.verify_full_size(hop, patience).await?;
    tunnels.verify(hop, patience).await?;
    Ok(())
}
