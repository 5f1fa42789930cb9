//! Hops: WireGuard tunnels between two hosts, and the routing that leads into them.
//!
//! After a migration, packets of a connection still arrive at the host that the client knows. They
//! reach the container's new host through a hop. Conntrack marks choose which packets take it
//! (`conntrack::steer`); this module makes the hop itself:
//!
//! ```text
//!   host A                                                       host B
//!   livemig3 100.115.7.4/31  ══ WireGuard over UDP, 51820.. ══  livemig1 100.115.7.5/31
//!   rule:  fwmark 0x03000000/0xff000000 lookup 7105795          fwmark 0x01000000/… lookup 7105793
//!   table 7105795:  default dev livemig3                        table 7105793:  default dev livemig1
//! ```
//!
//! Setting up takes two steps on each host, because neither knows the other's key at first:
//! [`Tunnels::open`] makes the interface and returns a [`Proposal`], which goes to the other host;
//! [`Tunnels::connect`] takes the proposal of the other host. Both do nothing if it is done
//! already, so that migrations that share a hop need not agree on who makes it. Both hosts derive
//! the same tunnel addresses from the two proposals.
//!
//! # Size of packets
//! The packets of a live connection are as large as its two ends agreed before there was a tunnel,
//! they must not be fragmented, and the message that would make a sender use smaller ones may be
//! filtered on its way. So a hop takes every packet as large as it is: its interface has the MTU of
//! the container's own network, and where the encrypted packet is too large for the link between
//! the hosts, that one is fragmented, which its ends never see.

mod address;
mod device;
mod error;
mod hop_id;
mod interface;
mod kernel;
mod key;
mod marker;
mod process;
mod registry;
mod route;
#[cfg(test)]
mod tests;
pub mod userspace;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

#[cfg(any(test, fuzzing))]
pub(crate) use device::fuzzing;

pub use address::{Ends, Party, Taken, TakenError, choose};
pub use error::{Error, Result};
pub use hop_id::{HopId, HopIdError};
pub(crate) use interface::check_forwarding;
pub use key::{PrivateKey, PublicKey, PublicKeyError};
pub use process::Process;
pub use registry::{Connection, Hop, HopSpec, Registry};

use crate::netlink::Namespace;
use interface::Netlink;

/// What drives the interface of a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// WireGuard in the kernel: the module `wireguard`, part of Linux since 5.6.
    Kernel,
    /// A process of ours: see [`userspace`].
    Userspace,
}

/// The better of the backends that this host has: the kernel's where it can be.
pub fn available() -> Backend {
    if kernel::is_available() {
        Backend::Kernel
    } else {
        Backend::Userspace
    }
}

/// The networks that this host has addresses in, or routes to.
///
/// # Errors
/// [`Error::Netlink`] if the kernel cannot be asked.
pub async fn taken() -> Result<Taken> {
    Netlink::open("lo")?.taken().await
}

/// The networks that the interfaces of this host are in, all of them.
///
/// # Errors
/// When the kernel cannot be asked.
pub(crate) async fn networks_of_host() -> Result<Vec<IpNetwork>> {
    Netlink::open("lo")?.networks().await
}

/// Switches on the loopback interface of a network namespace. It is no error if it is on.
///
/// # Errors
/// When the namespace cannot be entered, or the kernel refuses.
pub(crate) fn switch_on_loopback(namespace: &Namespace) -> crate::Result<()> {
    // The runtime's own threads are in another namespace.
    namespace.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(crate::Error::file(
                "start a runtime in",
                "/proc/thread-self/ns/net",
            ))?;
        Ok(runtime.block_on(async { Netlink::open("lo")?.switch_on().await })?)
    })?
}

/// How this host makes hops.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Where the records of hops are kept, usually `/run/livemig/hops`.
    pub directory: PathBuf,
    /// Where userspace devices have their sockets, usually [`userspace::UAPI_DIRECTORY`].
    pub uapi_directory: PathBuf,
    /// The program that runs [`userspace::run_device`] when it is called with
    /// [`userspace::DEVICE_COMMAND`], an interface and a socket.
    pub helper: PathBuf,
    /// The backend; without one, what is [`available`].
    pub backend: Option<Backend>,
    /// The first UDP port to try. Each hop takes the first free one from here on, so a firewall has
    /// to let as many in as the host has peers.
    pub first_port: u16,
    /// How often a silent hop sends an empty packet, in whole seconds; `None` for never.
    ///
    /// A connection may be idle for longer than a firewall or NAT between the hosts remembers the
    /// tunnel (often 30 s for UDP), and the side that speaks next may be the one that cannot open
    /// it. With this, it is enough that one side can reach the other. It costs 32 bytes of
    /// payload each time.
    pub keepalive: Option<Duration>,
    /// How long the process of a userspace device may take to begin.
    pub device_timeout: Duration,
}

impl Settings {
    /// The first port to try unless configured otherwise: WireGuard's customary one.
    pub const FIRST_PORT: u16 = 51820;
    /// The customary interval, shorter than the 30 s after which many NATs forget
    /// (<https://www.wireguard.com/quickstart/>).
    pub const KEEPALIVE: Duration = Duration::from_secs(25);

    /// The usual settings, with hops recorded in `directory` and devices run by `helper`.
    pub fn new(directory: impl Into<PathBuf>, helper: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            uapi_directory: userspace::UAPI_DIRECTORY.into(),
            helper: helper.into(),
            backend: None,
            first_port: Self::FIRST_PORT,
            keepalive: Some(Self::KEEPALIVE),
            device_timeout: userspace::START,
        }
    }
}

/// What a host tells the other one about its end of a hop. It crosses the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "RawProposal")]
pub struct Proposal {
    /// Its key for this hop.
    pub public_key: PublicKey,
    /// The UDP port it listens on.
    pub listen_port: u16,
    /// The largest packet it has to get through, in bytes.
    pub mtu: u16,
    /// Whether it has IPv6.
    pub ipv6: bool,
    /// The networks that tunnel addresses must stay clear of.
    pub taken: Taken,
}

/// [`Proposal`] before it was checked.
#[derive(Deserialize)]
struct RawProposal {
    public_key: PublicKey,
    listen_port: u16,
    mtu: u16,
    ipv6: bool,
    taken: Taken,
}

/// A proposal that no host of ours makes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposalError {
    /// Port zero cannot be sent to.
    #[error("a hop cannot listen on port 0")]
    Port,
    /// IPv6 does not work below, IP does not work above.
    #[error("an MTU of {0} bytes is not between {MIN_MTU} and {MAX_MTU}")]
    Mtu(u16),
}

/// The least MTU of IPv6 (RFC 8200, section 5).
const MIN_MTU: u16 = 1280;
/// What leaves room for 80 bytes around it (IPv6, UDP and WireGuard headers) in an IP packet.
const MAX_MTU: u16 = u16::MAX - 80;

impl TryFrom<RawProposal> for Proposal {
    type Error = ProposalError;

    fn try_from(raw: RawProposal) -> Result<Self, ProposalError> {
        if raw.listen_port == 0 {
            return Err(ProposalError::Port);
        }
        if !(MIN_MTU..=MAX_MTU).contains(&raw.mtu) {
            return Err(ProposalError::Mtu(raw.mtu));
        }
        Ok(Self {
            public_key: raw.public_key,
            listen_port: raw.listen_port,
            mtu: raw.mtu,
            ipv6: raw.ipv6,
            taken: raw.taken,
        })
    }
}

/// What a hop counted. All of it starts anew when the peer's key changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Bytes received, as WireGuard counts them.
    pub rx_bytes: u64,
    /// Bytes sent, as WireGuard counts them.
    pub tx_bytes: u64,
    /// When the two ends last agreed on a session key.
    pub last_handshake: Option<SystemTime>,
}

/// What a backend has to know of the peer.
#[derive(Debug, Clone, Copy)]
struct Configuration {
    key: PublicKey,
    endpoint: SocketAddr,
    /// In seconds; zero switches it off.
    keepalive: u16,
}

/// The networks that may come out of a hop: all. Steering sends the clients' addresses through it,
/// whatever they are; what may come out is decided packet by packet by the rules of steering.
fn everything() -> [IpAddr; 2] {
    [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()]
}

/// How long WireGuard's uapi may take. It answers in under a millisecond.
const UAPI: Duration = Duration::from_secs(5);
/// How long another livemig may take to make or remove a hop: a start of a process, a time-out or
/// two of its own.
const INTERFACE_LOCK: Duration = Duration::from_secs(60);
/// How many ports are tried: one for each hop a host can have.
const PORTS: u16 = 255;
/// A session key older than this is not used any more (REJECT_AFTER_TIME, WireGuard paper, 6.1).
const SESSION: Duration = Duration::from_secs(180);

/// Whether a session is used that began then, on a host whose clock was set forward since the peer was let in.
fn is_fresh(handshake: SystemTime, set_forward: Duration) -> bool {
    // A clock that was set back makes a handshake of the future: fresh enough.
    let age = handshake.elapsed().unwrap_or_default();
    // The handshake may have been before that or after it.
    age < SESSION || (set_forward..set_forward + SESSION).contains(&age)
}

/// By how much this host's clock was set forward since the peer was let in.
fn set_forward(connection: &Connection) -> Duration {
    let (then, now) = (connection.host_started, host_started());
    let further = then.zip(now).map(|(then, now)| now.saturating_sub(then));
    Duration::from_secs(further.unwrap_or_default())
}

/// When this host was started, in seconds since 1970 by its clock as it is now (`btime` in proc_stat(5)).
fn host_started() -> Option<u64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let started = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    started.trim().parse().ok()
}
/// The discard service (RFC 863): whether it exists does not matter, the packet only has to leave.
const DISCARD: u16 = 9;

/// Runs one blocking call of WireGuard's uapi, bounded. If it hangs, its thread does; we do not.
async fn bounded<T: Send + 'static>(
    action: &'static str,
    interface: &str,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T> {
    let interface = interface.to_owned();
    match tokio::time::timeout(UAPI, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(Ok(value))) => Ok(value),
        Ok(Ok(Err(reason))) => Err(Error::Uapi {
            action,
            interface,
            reason,
        }),
        Ok(Err(_)) => Err(Error::Interrupted("a call of WireGuard's uapi")),
        Err(_) => Err(Error::UapiTimeout {
            action,
            interface,
            waited: UAPI,
        }),
    }
}

/// The hops of this host: makes, checks and removes them.
///
/// All of it happens in the network namespace of the thread that calls, and can be called from
/// several processes at once.
#[derive(Debug, Clone)]
pub struct Tunnels {
    settings: Settings,
    registry: Registry,
}

impl Tunnels {
    /// The hops of this host. Nothing is touched yet.
    pub fn new(settings: Settings) -> Self {
        let registry = Registry::new(&settings.directory);
        Self { settings, registry }
    }

    /// The records of the hops.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The hop to `peer` (the text of its fingerprint), with `user` (a migration, a container)
    /// among those that need it, and whether it was made just now. A new one is a number and a
    /// record so far: note its [`HopSpec`] for undoing, then [`open`](Self::open) it.
    ///
    /// # Errors
    /// [`Error::Exhausted`] if there is no number left, and those of files.
    pub fn acquire(&self, peer: &str, user: &str) -> Result<(Hop, bool)> {
        let backend = self.settings.backend.unwrap_or_else(available);
        self.registry
            .acquire(peer, user, backend, &self.settings.uapi_directory)
    }

    /// Takes `user` off the hop; says whether it was the last. The hop stays until
    /// [`down`](Self::down) or [`down_if_unused`](Self::down_if_unused).
    ///
    /// # Errors
    /// Those of files.
    pub fn release(&self, hop: HopId, user: &str) -> Result<bool> {
        self.registry.release(hop, user)
    }

    /// Makes the interface of the hop, with a new key and a free port, switched on but without a
    /// peer and therefore shut. `mtu` is that of the containers' networks. A hop that is open
    /// already stays as it is, or gets the larger MTU. One whose interface is gone is made anew,
    /// with another key: its peer has to connect again.
    ///
    /// If it fails, there is no interface and no process; the record stays.
    ///
    /// # Errors
    /// [`Error::NotForwarding`], [`Error::NoPort`], [`Error::Device`], [`Error::Unknown`], and
    /// those of files, netlink and uapi.
    pub async fn open(&self, hop: HopId, mtu: u16) -> Result<Proposal> {
        check_forwarding()?;
        let _lock = self.registry.lock_interfaces(INTERFACE_LOCK).await?;
        let record = self.registry.get(hop)?.ok_or(Error::Unknown(hop))?;
        let mtu = mtu.clamp(MIN_MTU, MAX_MTU);
        if let Some(mut proposal) = record.proposal.clone()
            && is_alive(&record.spec)
        {
            if mtu > proposal.mtu {
                proposal.mtu = mtu;
                let now = record.connection.as_ref().map_or(mtu, |c| c.mtu.max(mtu));
                self.resize(&record, now).await?;
                let proposal = proposal.clone();
                self.registry
                    .update(hop, |hop| hop.proposal = Some(proposal))?;
            }
            return Ok(proposal);
        }
        let made = match self.remains(&record).await {
            Ok(()) => self.make(&record, mtu).await,
            Err(error) => Err(error),
        };
        if made.is_err()
            && let Ok(Some(record)) = self.registry.get(hop)
            && let Err(error) = self.remains(&record).await
        {
            tracing::warn!(%error, %hop, "remains of a hop that could not be opened");
        }
        made
    }

    /// The work of [`open`](Self::open).
    async fn make(&self, record: &Hop, mtu: u16) -> Result<Proposal> {
        let spec = &record.spec;
        let netlink = Netlink::open(&spec.interface)?;
        let key = PrivateKey::generate()?;
        match spec.backend {
            Backend::Kernel => netlink.add_wireguard().await?,
            Backend::Userspace => {
                let log = self.registry.log_path(spec.hop);
                let within = self.settings.device_timeout;
                userspace::start(&self.settings.helper, spec, &log, within, |process| {
                    self.registry
                        .update(spec.hop, |hop| hop.device = Some(process))
                        .map(|_| ())
                })
                .await?;
            }
        }
        // Before the interface is switched on: what it does when it is depends on them.
        interface::set_parameters(&spec.interface)?;
        netlink.bring_up(within(spec.backend, mtu)).await?;
        let listen_port = self.take_port(spec, &key).await?;
        let proposal = Proposal {
            public_key: key.public(),
            listen_port,
            mtu,
            ipv6: interface::has_ipv6(),
            taken: netlink.taken().await?,
        };
        let kept = proposal.clone();
        self.registry.update(spec.hop, |hop| {
            hop.proposal = Some(kept);
            hop.connection = None;
            hop.owners.clear();
        })?;
        Ok(proposal)
    }

    /// Gives the interface its key, and the first port that nobody else has.
    async fn take_port(&self, spec: &HopSpec, key: &PrivateKey) -> Result<u16> {
        let first = self.settings.first_port.max(1);
        let last = first.saturating_add(PORTS - 1);
        let mut reason = String::new();
        for port in first..=last {
            // A port that is taken is better found out without telling the device: it would log it.
            if let Err(error) = is_free(port) {
                reason = error.to_string();
                continue;
            }
            let set = match spec.backend {
                Backend::Kernel => kernel::set_key(&spec.interface, key, port).await,
                Backend::Userspace => userspace::set_key(spec, key, port).await,
            };
            match set {
                Ok(()) => return Ok(port),
                // Someone was faster, or the device itself is at fault: then all ports will fail,
                // and the last error tells.
                Err(Error::Uapi { reason: why, .. }) if is_alive(spec) => reason = why,
                Err(error) => return Err(error),
            }
        }
        Err(Error::NoPort {
            interface: spec.interface.clone(),
            first,
            last,
            reason,
        })
    }

    /// Lets the peer in: its key, its address, the tunnel's own addresses, the hop's table and
    /// rules. `address` is where the peer can be reached; its port is in its proposal. Doing it
    /// again with the same peer leaves a running session alone; with another key (the peer made
    /// its end anew) it replaces the old one.
    ///
    /// # Errors
    /// [`Error::TooEarly`] before [`open`](Self::open), [`Error::NoAddress`], [`Error::Itself`],
    /// [`Error::Unknown`], and those of files, netlink and uapi.
    pub async fn connect(&self, hop: HopId, peer: &Proposal, address: IpAddr) -> Result<Hop> {
        let _lock = self.registry.lock_interfaces(INTERFACE_LOCK).await?;
        let record = self.registry.get(hop)?.ok_or(Error::Unknown(hop))?;
        let spec = &record.spec;
        let Some(own) = record.proposal.as_ref().filter(|_| is_alive(spec)) else {
            return Err(Error::TooEarly {
                hop,
                needed: "open",
            });
        };
        let (v4, v6) = choose(own.party(), peer.party())?;
        let mut connection = Connection {
            peer_key: peer.public_key,
            // A caller's address, at an agent that listens for both families, is an IPv4 address within
            // an IPv6 one. It has to be the same by which this host calls: another one is another peer,
            // whose session begins anew, and what is on its way is lost.
            endpoint: SocketAddr::new(address.to_canonical(), peer.listen_port),
            v4,
            v6,
            mtu: own.mtu.max(peer.mtu),
            host_started: host_started(),
        };
        let same_peer = record.connection.as_ref().filter(|old| {
            (old.peer_key, old.endpoint) == (connection.peer_key, connection.endpoint)
        });
        if let Some(old) = same_peer {
            connection.host_started = old.host_started;
        }
        let same_peer = same_peer.is_some();
        let netlink = Netlink::open(&spec.interface)?;
        netlink
            .bring_up(within(spec.backend, connection.mtu))
            .await?;
        let ends: Vec<Ends> = v4.into_iter().chain(v6).collect();
        netlink.set_addresses(&ends).await?;
        route::install(&netlink, hop).await?;
        // The peer last: from here on packets can come.
        if !same_peer {
            let peer = Configuration {
                key: connection.peer_key,
                endpoint: connection.endpoint,
                keepalive: self.settings.keepalive.map_or(0, |interval| {
                    u16::try_from(interval.as_secs()).unwrap_or(u16::MAX)
                }),
            };
            match spec.backend {
                Backend::Kernel => kernel::set_peer(&spec.interface, peer).await?,
                Backend::Userspace => userspace::set_peer(spec, peer).await?,
            }
        }
        self.registry
            .update(hop, |hop| hop.connection = Some(connection))
    }

    /// Makes sure that the two ends have a session: sends full-size packets to the peer's tunnel
    /// address and waits until a handshake is done. Returns how long that took.
    ///
    /// The end that connects second should do this; the first one's attempts before that were in
    /// vain and are repeated after 5 s only.
    ///
    /// # Errors
    /// [`Error::NoHandshake`] after `patience`; [`Error::TooEarly`] before
    /// [`connect`](Self::connect); [`Error::Unknown`], and those of files and uapi.
    pub async fn verify(&self, hop: HopId, patience: Duration) -> Result<Duration> {
        let (record, connection) = self.connected(hop)?;
        let begin = Instant::now();
        let mut next_packet = begin;
        loop {
            if Instant::now() >= next_packet {
                probe(&connection, within(record.spec.backend, connection.mtu)).await;
                next_packet = Instant::now() + Duration::from_millis(250);
            }
            let status = self.status_of(&record.spec).await?;
            let fresh = status
                .last_handshake
                .is_some_and(|at| is_fresh(at, set_forward(&connection)));
            if fresh {
                // For the peer's `verify_full_size`: one more, should the first have been lost.
                probe(&connection, within(record.spec.backend, connection.mtu)).await;
                return Ok(begin.elapsed());
            }
            if begin.elapsed() >= patience {
                return Err(Error::NoHandshake {
                    interface: record.spec.interface,
                    endpoint: connection.endpoint,
                    listen_port: record.proposal.map_or(0, |own| own.listen_port),
                    waited: begin.elapsed(),
                });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Makes sure that full-size packets of the peer arrive, fragmented or not, by its
    /// [`verify`](Self::verify): at least one such packet was received since the hop was connected.
    ///
    /// # Errors
    /// [`Error::NoFullSize`] after `patience`; otherwise as [`verify`](Self::verify).
    pub async fn verify_full_size(&self, hop: HopId, patience: Duration) -> Result<()> {
        let (record, connection) = self.connected(hop)?;
        let begin = Instant::now();
        loop {
            let status = self.status_of(&record.spec).await?;
            if status.rx_bytes >= u64::from(within(record.spec.backend, connection.mtu)) {
                return Ok(());
            }
            if begin.elapsed() >= patience {
                return Err(Error::NoFullSize {
                    interface: record.spec.interface,
                    endpoint: connection.endpoint,
                    mtu: connection.mtu,
                    received: status.rx_bytes,
                    waited: begin.elapsed(),
                });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// What the hop counted.
    ///
    /// # Errors
    /// [`Error::Unknown`], and those of files and uapi.
    pub async fn status(&self, hop: HopId) -> Result<Status> {
        let record = self.registry.get(hop)?.ok_or(Error::Unknown(hop))?;
        self.status_of(&record.spec).await
    }

    async fn status_of(&self, spec: &HopSpec) -> Result<Status> {
        match spec.backend {
            Backend::Kernel => kernel::status(&spec.interface).await,
            Backend::Userspace => userspace::status(spec).await,
        }
    }

    /// Removes all of a hop: rules, process, interface with its addresses, routes and parameters,
    /// socket, log and record. What is gone already is fine, and so is a hop that was never opened.
    /// A later hop of the same number is left alone.
    ///
    /// # Errors
    /// [`Error::WouldNotEnd`], [`Error::Locked`], and those of files and netlink. Whatever can be
    /// removed is, also after a failure; the first one is returned, and the record stays so that it
    /// can be tried again.
    pub async fn down(&self, spec: &HopSpec) -> Result<()> {
        self.take_down(spec, false).await.map(|_| ())
    }

    /// Like [`down`](Self::down), unless the hop has users; says whether it was removed.
    ///
    /// # Errors
    /// As [`down`](Self::down).
    pub async fn down_if_unused(&self, spec: &HopSpec) -> Result<bool> {
        self.take_down(spec, true).await
    }

    async fn take_down(&self, spec: &HopSpec, unless_used: bool) -> Result<bool> {
        let _lock = self.registry.lock_interfaces(INTERFACE_LOCK).await?;
        let record = match self.registry.retire(spec, unless_used)? {
            Some(record) => record,
            // Somebody else's by now, or still in use.
            None if self.registry.get(spec.hop)?.is_some() => return Ok(false),
            // Without a record whatever has the number's interface belongs to nobody.
            None => Hop {
                spec: spec.clone(),
                peer: String::new(),
                users: Default::default(),
                proposal: None,
                connection: None,
                device: None,
                owners: Vec::new(),
            },
        };
        self.remains(&record).await?;
        self.registry.remove(spec.hop)?;
        Ok(true)
    }

    /// Removes everything that a hop has outside its record. Goes on after a failure and returns
    /// the first one.
    async fn remains(&self, record: &Hop) -> Result<()> {
        let spec = &record.spec;
        let netlink = Netlink::open(&spec.interface)?;
        // Rules first: without the interface, they would only lead to an empty table.
        let rules = route::remove(&netlink, spec.hop).await;
        let process = match spec.backend {
            Backend::Kernel => Ok(()),
            Backend::Userspace => self.end_device(record).await,
        };
        let link = netlink.remove().await;
        rules.and(process).and(link)
    }

    async fn end_device(&self, record: &Hop) -> Result<()> {
        let spec = &record.spec;
        let mut ended = Ok(());
        // The record may lack it if we died right after the start; the socket knows it then.
        let behind = userspace::process_behind(&spec.socket);
        for process in record.device.into_iter().chain(behind) {
            ended = ended.and(process.end(&spec.interface, userspace::STOP).await);
        }
        for path in [&spec.socket, &self.registry.log_path(spec.hop)] {
            match std::fs::remove_file(path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    ended = ended.and(Err(error::file("remove", path)(error)));
                }
                _ => {}
            }
        }
        ended
    }

    async fn resize(&self, record: &Hop, mtu: u16) -> Result<()> {
        let netlink = Netlink::open(&record.spec.interface)?;
        netlink.bring_up(within(record.spec.backend, mtu)).await
    }

    fn connected(&self, hop: HopId) -> Result<(Hop, Connection)> {
        let record = self.registry.get(hop)?.ok_or(Error::Unknown(hop))?;
        let connection = record.connection.clone().ok_or(Error::TooEarly {
            hop,
            needed: "connected",
        })?;
        Ok((record, connection))
    }
}

impl Proposal {
    fn party(&self) -> Party<'_> {
        Party {
            key: &self.public_key,
            taken: &self.taken,
            ipv6: self.ipv6,
        }
    }
}

/// Whether the interface is there and can be configured.
fn is_alive(spec: &HopSpec) -> bool {
    interface::exists(&spec.interface)
        && (spec.backend == Backend::Kernel || userspace::answers(&spec.socket))
}

/// The largest packet that the backend can take, up to `mtu`.
fn within(backend: Backend, mtu: u16) -> u16 {
    match backend {
        Backend::Kernel => mtu,
        Backend::Userspace => mtu.min(userspace::MAX_MTU),
    }
}

/// Whether nobody has this UDP port, in either family.
fn is_free(port: u16) -> std::io::Result<()> {
    std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    if interface::has_ipv6() {
        std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))?;
    }
    Ok(())
}

/// Sends one packet that fills the MTU to the peer's tunnel address. Whether it can be sent is found
/// out by what comes of it.
async fn probe(connection: &Connection, mtu: u16) {
    let Some(ends) = connection.v4.or(connection.v6) else {
        return;
    };
    // Headers of IP and UDP: 20 or 40, and 8 bytes.
    let headers = if ends.local.is_ipv4() { 28 } else { 48 };
    let payload = vec![0; usize::from(mtu) - headers];
    let sent = async {
        let socket = tokio::net::UdpSocket::bind((ends.local, 0)).await?;
        socket.send_to(&payload, (ends.peer, DISCARD)).await
    };
    if let Err(error) = sent.await {
        tracing::debug!(%error, peer = %ends.peer, "a probe of the hop could not be sent");
    }
}
