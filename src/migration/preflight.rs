//! Both hosts are looked at, and nothing is changed.

use hyper::Method;
use serde::Serialize;

use super::check as checks;
use super::engine::{self, Engine};
use super::lock::Lock;
use super::{Clock, Event, Request, flows, precopy};
use crate::agent::protocol::{Assessment, Offer};
use crate::agent::{Connection, Peer, PeerName, Peers, Permission};
use crate::conntrack::Flow;
use crate::criu::{Features, Finding, Severity};
use crate::podman::{Client, Container};
use crate::runtime::setup;
use crate::{Config, Error, Result};

/// What was seen of a container and of the two hosts.
#[derive(Debug, Clone, Serialize)]
pub struct Preflight {
    /// The container.
    pub container: Container,
    /// What is told to the destination about it.
    #[serde(skip)]
    pub offer: Offer,
    /// What the destination says.
    pub assessment: Assessment,
    /// The connections it has at this moment.
    pub flows: Vec<Flow>,
    /// How its processes will cross.
    pub engine: Engine,
    /// What both hosts found, refusals first.
    pub findings: Vec<Finding>,
}

impl Preflight {
    /// Whether nothing stands in the way.
    pub fn passes(&self) -> bool {
        self.findings
            .iter()
            .all(|finding| finding.severity != Severity::Refuse)
    }
}

/// A migration that may begin.
pub(super) struct Ready {
    pub preflight: Preflight,
    pub peer: Peer,
    pub connection: Connection,
    pub podman: Client,
    pub lock: Lock,
}

/// Looks whether a container could move. Changes nothing.
///
/// What stands in the way is in [`Preflight::findings`], and no error.
///
/// # Errors
/// When one of the hosts could not be looked at, or has no such container.
pub async fn check(request: &Request) -> Result<Preflight> {
    Ok(look(request, &request.container).await?.0)
}

/// Looks, and refuses if something stands in the way.
pub(super) async fn ready(request: &Request, clock: &mut Clock<'_>) -> Result<Ready> {
    must_be_root()?;
    let config = &request.config;
    Lock::look(config.lock_dir(), &request.container)?;
    let container = find(&podman(config)?, &request.container).await?;
    // Before it is looked at: what another migration is about to change proves nothing.
    let lock = Lock::take(config.lock_dir(), &container.id, &container.name)?;
    let (preflight, peer, connection, podman) = look(request, container.id.as_str()).await?;
    checks::refuse(&preflight.container.name, &request.to, &preflight.findings)?;
    for finding in &preflight.findings {
        clock.observer.observe(Event::Warning {
            finding: finding.clone(),
        });
    }
    Ok(Ready {
        preflight,
        peer,
        connection,
        podman,
        lock,
    })
}

async fn look(
    request: &Request,
    name_or_id: &str,
) -> Result<(Preflight, Peer, Connection, Client)> {
    must_be_root()?;
    let config = &request.config;
    let podman = podman(config)?;
    let peer = peer(config, &request.to)?;
    if !peer.may(Permission::Receive) {
        return Err(Error::MayNotReceive(peer.name));
    }
    let container = find(&podman, name_or_id).await?;
    let mut connection = connect(config, &peer).await?;

    let (host, features, flows) = futures::join!(
        podman.host(),
        Features::of_this_host(),
        flows::live(&container)
    );
    let (host, flows) = (host?, flows?);
    let mut networks = Vec::new();
    for attachment in &container.networks {
        networks.extend(podman.network(&attachment.name).await?);
    }
    let mut findings = checks::at_source(&container, &host, &features, &networks, &flows);
    let direct = setup::wrapper(config, &host).is_some();
    let offer = Offer {
        container: container.clone(),
        networks,
        host,
        features,
        direct,
        memory: precopy::resident(&container),
    };
    let assessment: Assessment = connection
        .call(Method::POST, "/v1/assess", &offer)
        .await
        .map_err(Error::of_host(&request.to))?;
    findings.extend(assessment.findings.iter().cloned());
    let engine = engine::choose(request, &offer, &assessment);
    if engine == Engine::Rest {
        findings.extend(checks::by_podman(&container));
    }
    let mut preflight = Preflight {
        container,
        offer,
        assessment,
        flows,
        engine,
        findings,
    };
    preflight
        .findings
        .extend(engine::unavailable(request, &preflight));
    preflight
        .findings
        .extend(engine::too_large(request, &preflight));
    preflight
        .findings
        .extend(engine::post_copy(request, &preflight));
    preflight
        .findings
        .sort_by_key(|finding| finding.severity != Severity::Refuse);
    Ok((preflight, peer, connection, podman))
}

/// The container of this name or ID.
///
/// # Errors
/// [`Error::NoContainer`] if there is none.
pub(crate) async fn find(podman: &Client, name: &str) -> Result<Container> {
    match podman.inspect(name).await {
        Err(error) if error.is_not_found() => Err(Error::NoContainer(name.to_owned())),
        found => Ok(found?),
    }
}

/// Freezing, namespaces, netlink: all of it is root's.
///
/// # Errors
/// [`Error::NotRoot`].
pub fn must_be_root() -> Result<()> {
    if rustix::process::geteuid().is_root() {
        Ok(())
    } else {
        Err(Error::NotRoot)
    }
}

/// Podman on this host.
///
/// # Errors
/// [`Error::NoPodman`] when its socket is not there.
pub(crate) fn podman(config: &Config) -> Result<Client> {
    if !config.podman_socket.exists() {
        return Err(Error::NoPodman(config.podman_socket.clone()));
    }
    Ok(Client::with_timeouts(&config.podman_socket, config.podman))
}

/// The host of that name.
pub(super) fn peer(config: &Config, name: &str) -> Result<Peer> {
    let name: PeerName = name.parse()?;
    Ok(Peers::open(&config.state_dir, &config.limits)?.get(&name)?)
}

/// A connection to the agent of a host.
pub(crate) async fn connect(config: &Config, peer: &Peer) -> Result<Connection> {
    let address = peer
        .address
        .as_ref()
        .ok_or_else(|| Error::NoAddress(peer.name.clone()))?;
    Ok(Connection::to_peer(address, peer, &config.state_dir, &config.limits).await?)
}
