//! What a container is made of: everything that a migration has to recreate, or to refuse over.
//!
//! Podman's own answer is read into small types that ignore what they do not know and take a
//! missing field for its zero value, because the answer differs between versions. What comes out
//! is [`Container`], in our own words, which also crosses the wire to the destination.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};

use super::client::Client;
use super::error::{Error, Result};
use super::id::{ContainerId, ImageId, check_name};
use super::request::{Purpose, Upload};

/// A container, as it was when it was inspected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Its ID, the same on every host that it moves to.
    pub id: ContainerId,
    /// Its name.
    pub name: String,
    /// The image it was made from; `None` if it was made from a directory (`--rootfs`).
    pub image: Option<ImageId>,
    /// That image's name. The destination's Podman looks the image up by *this* before it looks
    /// at the ID, and asks a registry if the name is unknown there.
    pub image_name: String,
    /// What it is doing.
    pub status: Status,
    /// Its first process, as this host counts, if it runs.
    pub pid: Option<u32>,
    /// The process that watches over it.
    pub conmon_pid: Option<u32>,
    /// The OCI runtime, by name: `runc`, `crun`.
    pub runtime: String,
    /// Its cgroup, relative to the root of the cgroup namespace that Podman runs in; on cgroup v2
    /// below `/sys/fs/cgroup`. `None` while it does not run.
    pub cgroup_path: Option<PathBuf>,
    /// Whether Podman made no cgroup for it (`--cgroups=disabled`).
    pub without_cgroup: bool,
    /// The networks it is on itself; empty if it has the namespace of the host, of another
    /// container or of its pod.
    pub networks: Vec<Attachment>,
    /// The ports it publishes itself; consecutive ones together.
    pub ports: Vec<PublishedPort>,
    /// What is mounted into it, sorted by place.
    pub mounts: Vec<Mount>,
    /// Whether it is removed when it ends (`--rm`), which a checkpoint does to it as well.
    pub auto_remove: bool,
    /// Whether it has all privileges.
    pub privileged: bool,
    /// Its network namespace.
    pub network_mode: Mode,
    /// Its process namespace.
    pub pid_mode: Mode,
    /// Its namespace for System V IPC and POSIX queues.
    pub ipc_mode: Mode,
    /// Its namespace for the host name.
    pub uts_mode: Mode,
    /// Its user namespace.
    pub user_mode: Mode,
    /// Its cgroup namespace.
    pub cgroup_mode: Mode,
    /// How its users are mapped to those of the host, if they are.
    pub uid_map: Vec<IdMapping>,
    /// How its groups are.
    pub gid_map: Vec<IdMapping>,
    /// The pod it is in.
    pub pod: Option<String>,
    /// Whether it is a pod's infra container.
    pub infra: bool,
    /// The containers that have to run before it. Podman exports no checkpoint of one that has any.
    pub dependencies: Vec<ContainerId>,
    /// Its root file system.
    pub rootfs: RootFs,
    /// The secrets that are mounted into it, by name.
    pub secrets: Vec<String>,
    /// The secrets that it was given as environment variables, by name. The values are in its
    /// memory and move with it; the secrets are needed when it is started anew.
    pub environment_secrets: Vec<String>,
    /// Whether it has a health check; its timer does not move.
    pub health_check: bool,
    /// The sessions of `podman exec` in it; they do not move.
    pub exec_sessions: Vec<String>,
    /// Whether it has a terminal.
    pub tty: bool,
    /// Whether its standard input is held open.
    pub interactive: bool,
    /// Where Podman keeps its files about it: `.../overlay-containers/ID/userdata`.
    pub static_dir: PathBuf,
    /// Its OCI configuration (`config.json`), if it has run.
    pub oci_config: Option<PathBuf>,
    /// How its output is logged: only `k8s-file` and `json-file` move with it.
    pub log_driver: String,
    /// The log's file, if it is one.
    pub log_path: Option<PathBuf>,
    /// What happens when it ends.
    pub restart_policy: RestartPolicy,
    /// The capabilities that it has, for example `CAP_NET_ADMIN`.
    pub capabilities: Vec<String>,
    /// `seccomp=...`, `label=...`, `unmask=...` and the like, as they were asked for.
    pub security_options: Vec<String>,
    /// The AppArmor profile that confines it; the destination needs it.
    pub apparmor_profile: Option<String>,
    /// The SELinux label of its processes.
    pub process_label: Option<String>,
    /// Devices of the host that it was given. (With `privileged` it has all of them.)
    pub devices: Vec<Device>,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

impl Container {
    /// Whether it runs and is not paused, which is what a checkpoint needs.
    pub fn is_running(&self) -> bool {
        self.status == Status::Running
    }

    /// The names of its volumes, anonymous ones too.
    pub fn volumes(&self) -> impl Iterator<Item = &str> {
        self.mounts.iter().filter_map(|mount| match mount {
            Mount::Volume { name, .. } => Some(name.as_str()),
            _ => None,
        })
    }

    /// Its IPv4 and IPv6 addresses on all of its networks.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.networks.iter().flat_map(|attachment| {
            [
                attachment.ip.map(IpAddr::V4),
                attachment.ip6.map(IpAddr::V6),
            ]
            .into_iter()
            .flatten()
        })
    }
}

/// What a container is doing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Status {
    /// It exists, and that is all; also after a restore that failed half-way.
    Created,
    /// Its runtime has made it, but its process was not started yet.
    Initialized,
    /// It runs.
    Running,
    /// It is frozen by `podman pause`. (A cgroup that somebody else froze does not show.)
    Paused,
    /// It is being stopped.
    Stopping,
    /// It was stopped, but not yet cleaned up.
    Stopped,
    /// It ended.
    Exited,
    /// It is being removed.
    Removing,
    /// Something that this version of livemig does not know.
    Other(String),
}

impl Status {
    fn read(text: &str) -> Status {
        match text {
            "created" | "configured" => Status::Created,
            "initialized" => Status::Initialized,
            "running" => Status::Running,
            "paused" => Status::Paused,
            "stopping" => Status::Stopping,
            "stopped" => Status::Stopped,
            "exited" => Status::Exited,
            "removing" => Status::Removing,
            other => Status::Other(other.to_owned()),
        }
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Status::Created => "created",
            Status::Initialized => "initialized",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopping => "stopping",
            Status::Stopped => "stopped",
            Status::Exited => "exited",
            Status::Removing => "removing",
            Status::Other(text) => text,
        })
    }
}

/// Whose namespace of a kind a container has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Mode {
    /// Its own.
    Private,
    /// Its own, which other containers may join (IPC).
    Shareable,
    /// Its own, on networks that netavark sets up (network).
    Bridge,
    /// Its own, with nothing in it (network, IPC).
    None,
    /// The host's.
    Host,
    /// That of the container with this ID.
    Container(String),
    /// The one that is bound to this path.
    Path(PathBuf),
    /// Another kind, in Podman's words: `pasta`, `slirp4netns`...
    Other(String),
}

impl Mode {
    /// Reads Podman's word; an empty one is `default`.
    fn read(text: &str, default: Mode) -> Mode {
        match text {
            "" => default,
            "private" => Mode::Private,
            "shareable" => Mode::Shareable,
            "bridge" => Mode::Bridge,
            "none" => Mode::None,
            "host" => Mode::Host,
            _ => {
                if let Some(id) = text.strip_prefix("container:") {
                    Mode::Container(id.to_owned())
                } else if let Some(path) = text.strip_prefix("ns:") {
                    Mode::Path(path.into())
                } else {
                    Mode::Other(text.to_owned())
                }
            }
        }
    }
}

/// A container's place on a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The network's name.
    pub name: String,
    /// The container's IPv4 address there.
    pub ip: Option<Ipv4Addr>,
    /// How many bits of it are the subnet.
    pub prefix: u8,
    /// Its IPv6 address there.
    pub ip6: Option<Ipv6Addr>,
    /// How many bits of it are the subnet.
    pub prefix6: u8,
    /// Its hardware address there.
    pub mac: Option<String>,
    /// Its IPv4 gateway.
    pub gateway: Option<Ipv4Addr>,
    /// Its IPv6 gateway.
    pub gateway6: Option<Ipv6Addr>,
}

/// Ports of a host that lead to ports of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// On this address of the host only; `None` is all of them. (Podman shows `0.0.0.0` for both
    /// "all" and "all of IPv4", so that is `None` as well.)
    pub host_ip: Option<IpAddr>,
    /// The first port on the host.
    pub host_port: u16,
    /// The first port in the container.
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// How many consecutive ports; at least one.
    pub range: u16,
}

impl PublishedPort {
    /// Reads one of Podman's mappings, which may name several protocols (`tcp,udp`).
    pub(super) fn read(
        host_ip: &str,
        host_port: u16,
        container_port: u16,
        range: u16,
        protocols: &str,
    ) -> Option<Vec<PublishedPort>> {
        let host_ip = match host_ip {
            "" | "0.0.0.0" => None,
            text => Some(text.parse().ok()?),
        };
        Some(
            protocols
                .split(',')
                .map(|protocol| PublishedPort {
                    host_ip,
                    host_port,
                    container_port,
                    protocol: protocol.to_owned(),
                    range: range.max(1),
                })
                .collect(),
        )
    }

    /// Whether both want the same port of the same address of a host.
    pub fn collides_with(&self, other: &PublishedPort) -> bool {
        let last = |port: &PublishedPort| port.host_port.saturating_add(port.range.max(1) - 1);
        self.protocol == other.protocol
            && self.host_port <= last(other)
            && other.host_port <= last(self)
            && match (self.host_ip, other.host_ip) {
                (Some(a), Some(b)) => a == b || a.is_unspecified() || b.is_unspecified(),
                _ => true,
            }
    }

    /// Whether nobody listens on any of the ports, in the network namespace of the calling thread:
    /// found out by binding them for a moment, as Podman itself does. SCTP is not looked at.
    ///
    /// # Errors
    /// When they cannot be bound for another reason, for example because the address is not one
    /// of this host's; Podman could not publish them either.
    pub fn is_free(&self) -> io::Result<bool> {
        let bind = |address: SocketAddr| match self.protocol.as_str() {
            "tcp" => TcpListener::bind(address).map(drop),
            "udp" => UdpSocket::bind(address).map(drop),
            _ => Ok(()),
        };
        for offset in 0..self.range {
            let Some(port) = self.host_port.checked_add(offset) else {
                break;
            };
            let bound = match self.host_ip {
                Some(ip) => bind((ip, port).into()),
                // Both families at once, unless there is only one.
                None => match bind((Ipv6Addr::UNSPECIFIED, port).into()) {
                    Err(e) if e.kind() != io::ErrorKind::AddrInUse => {
                        bind((Ipv4Addr::UNSPECIFIED, port).into())
                    }
                    bound => bound,
                },
            };
            match bound {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::AddrInUse => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// Joins what is consecutive on both sides.
    fn coalesce(mut ports: Vec<PublishedPort>) -> Vec<PublishedPort> {
        ports.sort_by(|a, b| {
            (&a.protocol, a.host_ip, a.host_port).cmp(&(&b.protocol, b.host_ip, b.host_port))
        });
        let mut joined: Vec<PublishedPort> = Vec::with_capacity(ports.len());
        for port in ports {
            if let Some(last) = joined.last_mut()
                && last.protocol == port.protocol
                && last.host_ip == port.host_ip
                && last.host_port.checked_add(last.range) == Some(port.host_port)
                && last.container_port.checked_add(last.range) == Some(port.container_port)
                && let Some(range) = last.range.checked_add(port.range)
            {
                last.range = range;
            } else {
                joined.push(port);
            }
        }
        joined
    }
}

/// Something that is mounted into a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind")]
#[non_exhaustive]
pub enum Mount {
    /// A file or directory of the host, which has to exist at the destination; never copied.
    Bind {
        /// On the host.
        source: PathBuf,
        /// In the container.
        destination: PathBuf,
        /// Whether the container may not write to it.
        read_only: bool,
        /// Mount options.
        options: Vec<String>,
    },
    /// A named or anonymous volume.
    Volume {
        /// Its name; 64 digits if it is anonymous.
        name: String,
        /// The volume driver; only `local` can be moved.
        driver: String,
        /// What the driver was told (`type=nfs` and so on); empty for a plain directory.
        driver_options: BTreeMap<String, String>,
        /// Whether it was made for this container and is removed with it. A restore makes it
        /// anew as a named one, so at the destination it is removed with nothing any more.
        anonymous: bool,
        /// Where it is on the host.
        source: PathBuf,
        /// In the container.
        destination: PathBuf,
        /// Whether the container may not write to it.
        read_only: bool,
        /// Mount options.
        options: Vec<String>,
        /// The volume's labels.
        labels: BTreeMap<String, String>,
    },
    /// A tmpfs; CRIU carries its content.
    Tmpfs {
        /// In the container.
        destination: PathBuf,
        /// Mount options.
        options: Vec<String>,
    },
    /// Another image, mounted. A container that has one cannot be restored (Podman 5.8.6).
    Image {
        /// The image, by name or ID.
        image: String,
        /// In the container.
        destination: PathBuf,
    },
    /// A directory of the host with a writable layer of the container's own over it (`:O`). The
    /// layer is not in a checkpoint, and the restore fails (Podman 5.8.6).
    Overlay {
        /// On the host.
        lower: PathBuf,
        /// The layer's directory.
        upper: Option<PathBuf>,
        /// In the container.
        destination: PathBuf,
    },
    /// Something else, for example `devpts`.
    Other {
        /// In Podman's words.
        what: String,
        /// In the container.
        destination: PathBuf,
    },
}

impl Mount {
    /// Where it is in the container.
    pub fn destination(&self) -> &Path {
        match self {
            Mount::Bind { destination, .. }
            | Mount::Volume { destination, .. }
            | Mount::Tmpfs { destination, .. }
            | Mount::Image { destination, .. }
            | Mount::Overlay { destination, .. }
            | Mount::Other { destination, .. } => destination,
        }
    }
}

/// A container's root file system.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// The storage driver, for example `overlay`.
    pub driver: String,
    /// What the container changed (overlay's upper directory).
    pub upper: Option<PathBuf>,
    /// Overlay's work directory.
    pub work: Option<PathBuf>,
    /// The whole as the container sees it; only while it is mounted.
    pub merged: Option<PathBuf>,
    /// The image's layers, the topmost first.
    pub lower: Vec<PathBuf>,
    /// The directory that it was made from instead of an image (`--rootfs`).
    pub directory: Option<PathBuf>,
    /// Whether the container may not write to it.
    pub read_only: bool,
}

/// What happens when a container ends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// `no`, `always`, `on-failure` or `unless-stopped`.
    pub name: String,
    /// After how many failures it is left alone; zero is never.
    pub maximum_retries: u32,
}

/// A device of the host in a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// On the host.
    pub host: PathBuf,
    /// In the container.
    pub container: PathBuf,
}

/// A run of user or group numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// The first in the container.
    pub container: u32,
    /// The first on the host.
    pub host: u32,
    /// How many.
    pub length: u32,
}

impl IdMapping {
    fn read(text: &str) -> Option<IdMapping> {
        let mut numbers = text.split(':').map(|n| n.parse().ok());
        let mapping = IdMapping {
            container: numbers.next()??,
            host: numbers.next()??,
            length: numbers.next()??,
        };
        numbers.next().is_none().then_some(mapping)
    }
}

impl Client {
    /// Everything that a migration has to know about a container, by its name or (shortened) ID.
    ///
    /// # Errors
    /// [`Error::NotFound`] if there is none, [`Error::Name`] if there can be none;
    /// [`Error::Malformed`] if Podman's answer lacks something that cannot be done without.
    pub async fn inspect(&self, name_or_id: &str) -> Result<Container> {
        check_name("container", name_or_id)?;
        let purpose = Purpose::new("inspect", format!("container {name_or_id}"));
        let path = format!("/containers/{name_or_id}/json");
        let answer = self
            .socket
            .send(self.ask(purpose.clone(), &path), Upload::empty())
            .await?;
        let mut container = answer
            .json::<Inspection>()
            .await?
            .container()
            .map_err(|reason| purpose.malformed(reason))?;
        // A volume's driver options, labels and namelessness are the volume's, not the mount's.
        for mount in &mut container.mounts {
            let Mount::Volume {
                name,
                driver,
                driver_options,
                anonymous,
                labels,
                ..
            } = mount
            else {
                continue;
            };
            if let Some(volume) = self.volume(name).await? {
                *driver = volume.driver;
                *driver_options = volume.options;
                *anonymous = volume.anonymous;
                *labels = volume.labels;
            }
        }
        Ok(container)
    }
}

/// Takes `null` for the zero value, as Go writes empty lists and maps.
pub(super) fn nullable<'de, D, T>(deserializer: D) -> std::result::Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Podman's answer, as far as it is read.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Inspection {
    id: ContainerId,
    name: String,
    state: InspectedState,
    #[serde(default)]
    image: String,
    #[serde(default)]
    image_name: String,
    #[serde(default)]
    rootfs: String,
    #[serde(default)]
    pod: String,
    #[serde(default)]
    static_dir: PathBuf,
    #[serde(default, rename = "OCIConfigPath")]
    oci_config_path: PathBuf,
    #[serde(rename = "OCIRuntime")]
    oci_runtime: String,
    #[serde(default)]
    process_label: String,
    #[serde(default)]
    app_armor_profile: String,
    #[serde(default, deserialize_with = "nullable")]
    effective_caps: Vec<String>,
    #[serde(default, rename = "ExecIDs", deserialize_with = "nullable")]
    exec_ids: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    graph_driver: InspectedGraph,
    #[serde(default, deserialize_with = "nullable")]
    mounts: Vec<InspectedMount>,
    #[serde(default, deserialize_with = "nullable")]
    dependencies: Vec<ContainerId>,
    #[serde(default, deserialize_with = "nullable")]
    network_settings: InspectedNetworks,
    #[serde(default)]
    is_infra: bool,
    config: InspectedConfig,
    host_config: InspectedHostConfig,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedState {
    status: String,
    #[serde(default)]
    pid: u32,
    #[serde(default)]
    conmon_pid: u32,
    #[serde(default)]
    cgroup_path: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct InspectedGraph {
    name: String,
    #[serde(deserialize_with = "nullable")]
    data: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedMount {
    r#type: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    source: String,
    destination: PathBuf,
    #[serde(default)]
    driver: String,
    #[serde(default, deserialize_with = "nullable")]
    options: Vec<String>,
    #[serde(default, rename = "RW")]
    rw: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct InspectedNetworks {
    #[serde(deserialize_with = "nullable")]
    networks: BTreeMap<String, InspectedAttachment>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct InspectedAttachment {
    #[serde(rename = "Gateway")]
    gateway: String,
    #[serde(rename = "IPAddress")]
    ip_address: String,
    #[serde(rename = "IPPrefixLen")]
    ip_prefix_len: u8,
    #[serde(rename = "IPv6Gateway")]
    ip6_gateway: String,
    #[serde(rename = "GlobalIPv6Address")]
    ip6_address: String,
    #[serde(rename = "GlobalIPv6PrefixLen")]
    ip6_prefix_len: u8,
    #[serde(rename = "MacAddress")]
    mac_address: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedConfig {
    #[serde(default)]
    tty: bool,
    #[serde(default)]
    open_stdin: bool,
    #[serde(default, deserialize_with = "nullable")]
    env: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    labels: BTreeMap<String, String>,
    #[serde(default, deserialize_with = "nullable")]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    healthcheck: Option<InspectedHealthCheck>,
    #[serde(default, deserialize_with = "nullable")]
    secrets: Vec<InspectedSecret>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedHealthCheck {
    #[serde(default, deserialize_with = "nullable")]
    test: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedSecret {
    name: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedHostConfig {
    #[serde(default, deserialize_with = "nullable")]
    log_config: InspectedLog,
    network_mode: String,
    #[serde(default, deserialize_with = "nullable")]
    port_bindings: BTreeMap<String, Option<Vec<InspectedBinding>>>,
    #[serde(default, deserialize_with = "nullable")]
    restart_policy: InspectedRestartPolicy,
    #[serde(default)]
    auto_remove: bool,
    #[serde(default)]
    ipc_mode: String,
    #[serde(default)]
    pid_mode: String,
    #[serde(default, rename = "UTSMode")]
    uts_mode: String,
    #[serde(default)]
    userns_mode: String,
    #[serde(default)]
    cgroup_mode: String,
    #[serde(default)]
    cgroups: String,
    #[serde(default, rename = "IDMappings", deserialize_with = "nullable")]
    id_mappings: InspectedMappings,
    #[serde(default)]
    privileged: bool,
    #[serde(default)]
    readonly_rootfs: bool,
    #[serde(default, deserialize_with = "nullable")]
    security_opt: Vec<String>,
    #[serde(default, deserialize_with = "nullable")]
    tmpfs: BTreeMap<PathBuf, String>,
    #[serde(default, deserialize_with = "nullable")]
    devices: Vec<InspectedDevice>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct InspectedLog {
    r#type: String,
    path: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct InspectedBinding {
    host_ip: String,
    host_port: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct InspectedRestartPolicy {
    name: String,
    maximum_retry_count: u32,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct InspectedMappings {
    #[serde(deserialize_with = "nullable")]
    uid_map: Vec<String>,
    #[serde(deserialize_with = "nullable")]
    gid_map: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct InspectedDevice {
    path_on_host: PathBuf,
    path_in_container: PathBuf,
}

fn not_empty(path: PathBuf) -> Option<PathBuf> {
    (!path.as_os_str().is_empty()).then_some(path)
}

fn not_blank(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

/// Podman's stars in place of the value of a secret (libpod/container_inspect.go).
const SECRET_VALUE: &str = "*******";

impl Inspection {
    pub(super) fn container(self) -> std::result::Result<Container, String> {
        let host = self.host_config;
        let config = self.config;
        let network_mode = Mode::read(&host.network_mode, Mode::Private);
        // One that shares a namespace shows the addresses of the one that it shares it with.
        let shared = matches!(
            network_mode,
            Mode::Container(_) | Mode::Host | Mode::None | Mode::Path(_)
        );
        let networks = if shared {
            Vec::new()
        } else {
            self.network_settings
                .networks
                .into_iter()
                .map(|(name, attachment)| attachment.read(name))
                .collect::<std::result::Result<_, _>>()?
        };
        let mut ports = Vec::new();
        for (key, bindings) in host.port_bindings {
            for binding in bindings.unwrap_or_default() {
                ports.extend(
                    binding
                        .read(&key)
                        .ok_or_else(|| format!("no port mapping: {key:?} {binding:?}"))?,
                );
            }
        }
        let mut graph = self.graph_driver;
        let mut place = |key: &str| graph.data.remove(key).map(PathBuf::from);
        let rootfs = RootFs {
            upper: place("UpperDir"),
            work: place("WorkDir"),
            merged: place("MergedDir"),
            lower: place("LowerDir")
                .iter()
                .flat_map(|joined| std::env::split_paths(joined))
                .collect(),
            directory: not_blank(self.rootfs).map(PathBuf::from),
            read_only: host.readonly_rootfs,
            driver: graph.name,
        };
        Ok(Container {
            id: self.id,
            name: self.name,
            image: not_blank(self.image)
                .map(|id| id.parse())
                .transpose()
                .map_err(|e: Error| e.to_string())?,
            image_name: self.image_name,
            status: Status::read(&self.state.status),
            pid: (self.state.pid != 0).then_some(self.state.pid),
            conmon_pid: (self.state.conmon_pid != 0).then_some(self.state.conmon_pid),
            runtime: self.oci_runtime,
            cgroup_path: not_blank(self.state.cgroup_path).map(PathBuf::from),
            without_cgroup: matches!(host.cgroups.as_str(), "disabled" | "no-conmon"),
            networks,
            ports: PublishedPort::coalesce(ports),
            mounts: read_mounts(self.mounts, host.tmpfs),
            auto_remove: host.auto_remove,
            privileged: host.privileged,
            network_mode,
            pid_mode: Mode::read(&host.pid_mode, Mode::Private),
            ipc_mode: Mode::read(&host.ipc_mode, Mode::Private),
            uts_mode: Mode::read(&host.uts_mode, Mode::Private),
            // No word at all is what a container in the host's user namespace has here.
            user_mode: Mode::read(&host.userns_mode, Mode::Host),
            cgroup_mode: Mode::read(&host.cgroup_mode, Mode::Private),
            uid_map: read_mappings(&host.id_mappings.uid_map)?,
            gid_map: read_mappings(&host.id_mappings.gid_map)?,
            pod: not_blank(self.pod),
            infra: self.is_infra,
            dependencies: self.dependencies,
            rootfs,
            secrets: config.secrets.into_iter().map(|s| s.name).collect(),
            environment_secrets: config
                .env
                .iter()
                .filter_map(|entry| entry.split_once('='))
                .filter(|(_, value)| *value == SECRET_VALUE)
                .map(|(name, _)| name.to_owned())
                .collect(),
            health_check: config.healthcheck.is_some_and(|check| {
                check
                    .test
                    .first()
                    .is_some_and(|first| !first.is_empty() && first != "NONE")
            }),
            exec_sessions: self.exec_ids,
            tty: config.tty,
            interactive: config.open_stdin,
            static_dir: self.static_dir,
            oci_config: not_empty(self.oci_config_path),
            log_driver: host.log_config.r#type,
            log_path: not_blank(host.log_config.path).map(PathBuf::from),
            restart_policy: RestartPolicy {
                name: host.restart_policy.name,
                maximum_retries: host.restart_policy.maximum_retry_count,
            },
            capabilities: self.effective_caps,
            security_options: host.security_opt,
            apparmor_profile: not_blank(self.app_armor_profile),
            process_label: not_blank(self.process_label),
            devices: host
                .devices
                .into_iter()
                .map(|device| Device {
                    host: device.path_on_host,
                    container: device.path_in_container,
                })
                .collect(),
            annotations: config.annotations,
            labels: config.labels,
        })
    }
}

impl InspectedAttachment {
    fn read(self, name: String) -> std::result::Result<Attachment, String> {
        fn address<T: std::str::FromStr>(
            network: &str,
            text: &str,
        ) -> std::result::Result<Option<T>, String> {
            if text.is_empty() {
                return Ok(None);
            }
            text.parse()
                .map(Some)
                .map_err(|_| format!("no address on network {network}: {text:?}"))
        }
        Ok(Attachment {
            ip: address(&name, &self.ip_address)?,
            prefix: self.ip_prefix_len,
            ip6: address(&name, &self.ip6_address)?,
            prefix6: self.ip6_prefix_len,
            mac: not_blank(self.mac_address),
            gateway: address(&name, &self.gateway)?,
            gateway6: address(&name, &self.ip6_gateway)?,
            name,
        })
    }
}

impl InspectedBinding {
    /// `key` is `80/tcp`.
    fn read(&self, key: &str) -> Option<Vec<PublishedPort>> {
        let (port, protocol) = key.split_once('/').unwrap_or((key, "tcp"));
        PublishedPort::read(
            &self.host_ip,
            self.host_port.parse().ok()?,
            port.parse().ok()?,
            1,
            protocol,
        )
    }
}

fn read_mappings(texts: &[String]) -> std::result::Result<Vec<IdMapping>, String> {
    texts
        .iter()
        .map(|text| IdMapping::read(text).ok_or_else(|| format!("no mapping: {text:?}")))
        .collect()
}

/// Sorts out what Podman lists as mounts. An overlay and an image are shown as a bind mount of the
/// directory where Podman merges them; an image is shown a second time as what it is.
fn read_mounts(mounts: Vec<InspectedMount>, tmpfs: BTreeMap<PathBuf, String>) -> Vec<Mount> {
    let images: Vec<PathBuf> = mounts
        .iter()
        .filter(|mount| mount.r#type == "image")
        .map(|mount| mount.destination.clone())
        .collect();
    let mut read: Vec<Mount> = mounts
        .into_iter()
        .filter(|mount| mount.r#type == "image" || !images.contains(&mount.destination))
        .map(InspectedMount::read)
        .collect();
    for (destination, options) in tmpfs {
        if !read.iter().any(|m| m.destination() == destination) {
            read.push(Mount::Tmpfs {
                destination,
                options: options.split(',').map(str::to_owned).collect(),
            });
        }
    }
    read.sort_by(|a, b| a.destination().cmp(b.destination()));
    read
}

impl InspectedMount {
    fn read(self) -> Mount {
        let option = |key: &str| {
            self.options
                .iter()
                .find_map(|o| o.strip_prefix(key)?.strip_prefix('='))
                .map(PathBuf::from)
        };
        match self.r#type.as_str() {
            "volume" => Mount::Volume {
                name: self.name,
                driver: self.driver,
                driver_options: BTreeMap::new(),
                anonymous: false,
                source: self.source.into(),
                destination: self.destination,
                read_only: !self.rw,
                options: self.options,
                labels: BTreeMap::new(),
            },
            "image" => Mount::Image {
                image: self.source,
                destination: self.destination,
            },
            "tmpfs" => Mount::Tmpfs {
                destination: self.destination,
                options: self.options,
            },
            "bind" => match option("lowerdir") {
                Some(lower) => Mount::Overlay {
                    lower,
                    upper: option("upperdir"),
                    destination: self.destination,
                },
                // `--mount type=devpts` is listed as a bind mount of "devpts".
                None if !self.source.starts_with('/') => Mount::Other {
                    what: self.source,
                    destination: self.destination,
                },
                None => Mount::Bind {
                    source: self.source.into(),
                    destination: self.destination,
                    read_only: !self.rw,
                    options: self.options,
                },
            },
            _ => Mount::Other {
                what: self.r#type,
                destination: self.destination,
            },
        }
    }
}

#[cfg(test)]
impl Container {
    /// A container as Podman shows it.
    pub(crate) fn read(json: &str) -> Container {
        serde_json::from_str::<Inspection>(json)
            .unwrap()
            .container()
            .unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Container {
        Container::read(json)
    }

    /// Much of what a plain container can have, as Podman 5.8.6 shows it; shortened, not changed.
    const WEB: &str = r#"
        {"Id":"ace791f8ac0242df90dda73352f43f26ad32ffe00cbc945b0ff2032fcdac06bf",
        "Name":"web","State":{"Status":"running","Pid":18276,"ConmonPid":18264,
        "CgroupPath":"/libpod_parent/libpod-ace791f8ac0242df90dda73352f43f26ad32ffe00cbc945b0ff2032fcdac06bf",
        "Health":{"Status":"starting","FailingStreak":0,"Log":null}},"Image":"6b9a7da665791134c70756a2f5395381241363c140e70303bbc24d970b01304a",
        "ImageName":"localhost/bb:1","Rootfs":"","Pod":"","StaticDir":"/var/lib/containers/storage/overlay-containers/ace791f8ac0242df90dda73352f43f26ad32ffe00cbc945b0ff2032fcdac06bf/userdata",
        "OCIConfigPath":"/var/lib/containers/storage/overlay-containers/ace791f8ac0242df90dda73352f43f26ad32ffe00cbc945b0ff2032fcdac06bf/userdata/config.json",
        "OCIRuntime":"runc","ProcessLabel":"","AppArmorProfile":"","EffectiveCaps":["CAP_CHOWN",
        "CAP_DAC_OVERRIDE"],"ExecIDs":["aa95b5ebf835c7f502cf843ec19c7d9f0f7c1d3f247b6fcd42d803264dab0546"],
        "GraphDriver":{"Name":"overlay","Data":{"LowerDir":"/var/lib/containers/storage/overlay/864c20d9dbfd9ae91ebc890c8f4cca66d935baf0acc246600c21e565955a8c63/diff",
        "MergedDir":"/var/lib/containers/storage/overlay/bc4bd5c3b328de7b8869d9b10b37e3f2f5663964cfac3d5a3c36c5a7c491f31f/merged",
        "UpperDir":"/var/lib/containers/storage/overlay/bc4bd5c3b328de7b8869d9b10b37e3f2f5663964cfac3d5a3c36c5a7c491f31f/diff",
        "WorkDir":"/var/lib/containers/storage/overlay/bc4bd5c3b328de7b8869d9b10b37e3f2f5663964cfac3d5a3c36c5a7c491f31f/work"}},
        "Mounts":[{"Type":"volume","Name":"4889aa5a9f67532a4adc5c1c476b741042fbb45252204900f269ad66d8fa9f01",
        "Source":"/var/lib/containers/storage/volumes/4889aa5a9f67532a4adc5c1c476b741042fbb45252204900f269ad66d8fa9f01/_data",
        "Destination":"/anon","Driver":"local","Mode":"","Options":["nosuid","nodev",
        "rbind"],"RW":true,"Propagation":"rprivate"},{"Type":"volume","Name":"vol1",
        "Source":"/var/lib/containers/storage/volumes/vol1/_data","Destination":"/data",
        "Driver":"local","Mode":"","Options":["nosuid","nodev","rbind"],"RW":true,
        "Propagation":"rprivate"},{"Type":"bind","Source":"/etc/hosts","Destination":"/mnt/h",
        "Driver":"","Mode":"","Options":["rbind"],"RW":false,"Propagation":"rprivate"}],
        "Dependencies":[],"NetworkSettings":{"Networks":{"net1":{"Gateway":"10.77.0.1",
        "IPAddress":"10.77.0.9","IPPrefixLen":24,"IPv6Gateway":"fd77::1","GlobalIPv6Address":"fd77::3",
        "GlobalIPv6PrefixLen":64,"MacAddress":"56:f7:95:dc:8b:bb"}}},"IsInfra":false,
        "Config":{"Tty":false,"OpenStdin":false,"StopSignal":15,"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "container=podman","HOME=/","HOSTNAME=ace791f8ac02"],"Labels":{"l":"m"},
        "Annotations":{"an":"no"},"Healthcheck":{"Test":["CMD-SHELL","true"],"Interval":30000000000,
        "Timeout":30000000000,"Retries":3},"Secrets":[{"Name":"sec1","ID":"8dc3dd1d1de91c81eb6b3c7af",
        "UID":0,"GID":0,"Mode":292}]},"HostConfig":{"LogConfig":{"Type":"k8s-file",
        "Config":null,"Path":"/var/lib/containers/storage/overlay-containers/ace791f8ac0242df90dda73352f43f26ad32ffe00cbc945b0ff2032fcdac06bf/userdata/ctr.log",
        "Tag":"","Size":"-1B"},"NetworkMode":"bridge","PortBindings":{"80/tcp":[{"HostIp":"0.0.0.0",
        "HostPort":"8080"}],"9000/udp":[{"HostIp":"127.0.0.1","HostPort":"9000"}],
        "9001/udp":[{"HostIp":"127.0.0.1","HostPort":"9001"}],"9002/udp":[{"HostIp":"127.0.0.1",
        "HostPort":"9002"}]},"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":3},
        "AutoRemove":false,"IpcMode":"shareable","PidMode":"private","UTSMode":"private",
        "UsernsMode":"","CgroupMode":"private","Cgroups":"default","Privileged":false,
        "ReadonlyRootfs":false,"SecurityOpt":[],"Tmpfs":{"/scratch":"rprivate,nosuid,nodev,tmpcopyup"},
        "Devices":[],"CapAdd":[]}}"#;

    /// Everything of the host's, and mounts of the rarer kinds.
    const ODD: &str = r#"
        {"Id":"9b4cdb1f936614c2768a65517bc45f663808d8b26af271e95921382345cca224",
        "Name":"odd","State":{"Status":"running","Pid":18314,"ConmonPid":18302,
        "CgroupPath":"/libpod_parent/libpod-9b4cdb1f936614c2768a65517bc45f663808d8b26af271e95921382345cca224"},
        "Image":"6b9a7da665791134c70756a2f5395381241363c140e70303bbc24d970b01304a",
        "ImageName":"localhost/bb:1","Rootfs":"","Pod":"","StaticDir":"/var/lib/containers/storage/overlay-containers/9b4cdb1f936614c2768a65517bc45f663808d8b26af271e95921382345cca224/userdata",
        "OCIConfigPath":"/var/lib/containers/storage/overlay-containers/9b4cdb1f936614c2768a65517bc45f663808d8b26af271e95921382345cca224/userdata/config.json",
        "OCIRuntime":"runc","ProcessLabel":"","AppArmorProfile":"","EffectiveCaps":["CAP_AUDIT_CONTROL",
        "CAP_AUDIT_READ"],"ExecIDs":[],"GraphDriver":{"Name":"overlay","Data":{"LowerDir":"/var/lib/containers/storage/overlay/864c20d9dbfd9ae91ebc890c8f4cca66d935baf0acc246600c21e565955a8c63/diff",
        "MergedDir":"/var/lib/containers/storage/overlay/d516ef3c6ec11ea06bac3f265e0cd41aa95f62ee4a3687281c74d09bfba9a52e/merged",
        "UpperDir":"/var/lib/containers/storage/overlay/d516ef3c6ec11ea06bac3f265e0cd41aa95f62ee4a3687281c74d09bfba9a52e/diff",
        "WorkDir":"/var/lib/containers/storage/overlay/d516ef3c6ec11ea06bac3f265e0cd41aa95f62ee4a3687281c74d09bfba9a52e/work"}},
        "Mounts":[{"Type":"image","Source":"localhost/multi:1","Destination":"/img",
        "Driver":"","Mode":"","Options":null,"RW":false,"Propagation":""},{"Type":"bind",
        "Source":"devpts","Destination":"/dp","Driver":"","Mode":"","Options":[],
        "RW":true,"Propagation":""},{"Type":"bind","Source":"/var/lib/containers/storage/overlay-containers/9b4cdb1f936614c2768a65517bc45f663808d8b26af271e95921382345cca224/userdata/overlay/3601989814/merge",
        "Destination":"/over","Driver":"","Mode":"","Options":["lowerdir=/o1","upperdir=/var/lib/containers/storage/overlay-containers/9b4cdb1f936614c2768a65517bc45f663808d8b26af271e95921382345cca224/userdata/overlay/3601989814/upper",
        "workdir=/var/lib/containers/storage/overlay-containers/9b4cdb1f936614c2768a65517bc45f663808d8b26af271e95921382345cca224/userdata/overlay/3601989814/work"],
        "RW":true,"Propagation":"private"},{"Type":"bind","Source":"/var/lib/containers/storage/overlay-containers/9b4cdb1f936614c2768a65517bc45f663808d8b26af271e95921382345cca224/userdata/overlay/3504223969/merge",
        "Destination":"/img","Driver":"","Mode":"","Options":["lowerdir=/var/lib/containers/storage/overlay/a4686dc060da0b08289766061132846612e7855a7740a1191a08267c1fa3a71e/merged:/var/lib/containers/storage/overlay-containers/9b4cdb1f936614c2768a65517bc45f663808d8b26af271e95921382345cca224/userdata/overlay/3504223969/lower"],
        "RW":true,"Propagation":"private"}],"Dependencies":[],"NetworkSettings":{"Networks":{"host":{"Gateway":"",
        "IPAddress":"","IPPrefixLen":0,"IPv6Gateway":"","GlobalIPv6Address":"",
        "GlobalIPv6PrefixLen":0,"MacAddress":""}}},"IsInfra":false,"Config":{"Tty":true,
        "OpenStdin":true,"StopSignal":15,"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "container=podman","TERM=xterm","HOME=/","HOSTNAME=a"],"Labels":null,"Annotations":{}},
        "HostConfig":{"LogConfig":{"Type":"k8s-file","Config":null,"Path":"/var/lib/containers/storage/overlay-containers/9b4cdb1f936614c2768a65517bc45f663808d8b26af271e95921382345cca224/userdata/ctr.log",
        "Tag":"","Size":"-1B"},"NetworkMode":"host","PortBindings":{},"RestartPolicy":{"Name":"no",
        "MaximumRetryCount":0},"AutoRemove":false,"IpcMode":"host","PidMode":"host",
        "UTSMode":"host","UsernsMode":"","CgroupMode":"host","Cgroups":"default",
        "Privileged":true,"ReadonlyRootfs":false,"SecurityOpt":["seccomp=unconfined",
        "unmask=all"],"Tmpfs":{"/t2":"rprivate,nosuid,nodev,tmpcopyup"},"Devices":[],
        "CapAdd":[]}}"#;

    /// In the namespaces of another container, which Podman shows as if they were its own.
    const JOIN: &str = r#"
        {"Id":"fafb1777f6c986c609d51fb5c68ab4fc029ff1cb719680e80fe96b7590608327",
        "Name":"join","State":{"Status":"running","Pid":18352,"ConmonPid":18340,
        "CgroupPath":"/libpod_parent/libpod-fafb1777f6c986c609d51fb5c68ab4fc029ff1cb719680e80fe96b7590608327"},
        "Image":"6b9a7da665791134c70756a2f5395381241363c140e70303bbc24d970b01304a",
        "ImageName":"localhost/bb:1","Rootfs":"","Pod":"","StaticDir":"/var/lib/containers/storage/overlay-containers/fafb1777f6c986c609d51fb5c68ab4fc029ff1cb719680e80fe96b7590608327/userdata",
        "OCIConfigPath":"/var/lib/containers/storage/overlay-containers/fafb1777f6c986c609d51fb5c68ab4fc029ff1cb719680e80fe96b7590608327/userdata/config.json",
        "OCIRuntime":"runc","ProcessLabel":"","AppArmorProfile":"","EffectiveCaps":["CAP_CHOWN",
        "CAP_DAC_OVERRIDE"],"ExecIDs":[],"GraphDriver":{"Name":"overlay","Data":{"LowerDir":"/var/lib/containers/storage/overlay/864c20d9dbfd9ae91ebc890c8f4cca66d935baf0acc246600c21e565955a8c63/diff",
        "MergedDir":"/var/lib/containers/storage/overlay/3b4fe9a9fbb262b9e04d1bafa0d4e206a89a4a2c77a868146a0d2de55a3285e3/merged",
        "UpperDir":"/var/lib/containers/storage/overlay/3b4fe9a9fbb262b9e04d1bafa0d4e206a89a4a2c77a868146a0d2de55a3285e3/diff",
        "WorkDir":"/var/lib/containers/storage/overlay/3b4fe9a9fbb262b9e04d1bafa0d4e206a89a4a2c77a868146a0d2de55a3285e3/work"}},
        "Mounts":[],"Dependencies":["ace791f8ac0242df90dda73352f43f26ad32ffe00cbc945b0ff2032fcdac06bf"],
        "NetworkSettings":{"Networks":{"net1":{"Gateway":"10.77.0.1","IPAddress":"10.77.0.9",
        "IPPrefixLen":24,"IPv6Gateway":"fd77::1","GlobalIPv6Address":"fd77::3",
        "GlobalIPv6PrefixLen":64,"MacAddress":"56:f7:95:dc:8b:bb"}}},"IsInfra":false,
        "Config":{"Tty":false,"OpenStdin":false,"StopSignal":15,"Env":["container=podman",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin","HOME=/",
        "HOSTNAME=fafb1777f6c9","sec1=*******"],"Labels":null,"Annotations":{}},
        "HostConfig":{"LogConfig":{"Type":"k8s-file","Config":null,"Path":"/var/lib/containers/storage/overlay-containers/fafb1777f6c986c609d51fb5c68ab4fc029ff1cb719680e80fe96b7590608327/userdata/ctr.log",
        "Tag":"","Size":"-1B"},"NetworkMode":"container:ace791f8ac0242df90dda73352f43f26ad32ffe00cbc945b0ff2032fcdac06bf",
        "PortBindings":{},"RestartPolicy":{"Name":"no","MaximumRetryCount":0},"AutoRemove":false,
        "IpcMode":"container:ace791f8ac0242df90dda73352f43f26ad32ffe00cbc945b0ff2032fcdac06bf",
        "PidMode":"container:ace791f8ac0242df90dda73352f43f26ad32ffe00cbc945b0ff2032fcdac06bf",
        "UTSMode":"private","UsernsMode":"","CgroupMode":"private","Cgroups":"default",
        "Privileged":false,"ReadonlyRootfs":false,"SecurityOpt":[],"Tmpfs":{},"Devices":[],
        "CapAdd":[]}}"#;

    /// In a user namespace, without a network, with a device.
    const MAPPED: &str = r#"
        {"Id":"03b937775c675044a8d8318648e359162a77629f573bc0e35d841b023fbfaba0",
        "Name":"ulog","State":{"Status":"running","Pid":20315,"ConmonPid":20300,
        "CgroupPath":"/libpod_parent/libpod-03b937775c675044a8d8318648e359162a77629f573bc0e35d841b023fbfaba0"},
        "Image":"6b9a7da665791134c70756a2f5395381241363c140e70303bbc24d970b01304a",
        "ImageName":"localhost/bb:1","Rootfs":"","Pod":"","StaticDir":"/var/lib/containers/storage/overlay-containers/03b937775c675044a8d8318648e359162a77629f573bc0e35d841b023fbfaba0/userdata",
        "OCIConfigPath":"/var/lib/containers/storage/overlay-containers/03b937775c675044a8d8318648e359162a77629f573bc0e35d841b023fbfaba0/userdata/config.json",
        "OCIRuntime":"runc","ProcessLabel":"","AppArmorProfile":"","EffectiveCaps":["CAP_CHOWN",
        "CAP_DAC_OVERRIDE"],"ExecIDs":[],"GraphDriver":{"Name":"overlay","Data":{"LowerDir":"/var/lib/containers/storage/overlay/864c20d9dbfd9ae91ebc890c8f4cca66d935baf0acc246600c21e565955a8c63/diff",
        "MergedDir":"/var/lib/containers/storage/overlay/6c4433eaa7fe157e729ef200b022a6bdf8ce07edacfde1d225874ad9681bc978/merged",
        "UpperDir":"/var/lib/containers/storage/overlay/6c4433eaa7fe157e729ef200b022a6bdf8ce07edacfde1d225874ad9681bc978/diff",
        "WorkDir":"/var/lib/containers/storage/overlay/6c4433eaa7fe157e729ef200b022a6bdf8ce07edacfde1d225874ad9681bc978/work"}},
        "Mounts":[{"Type":"volume","Name":"uvol","Source":"/var/lib/containers/storage/volumes/uvol/_data",
        "Destination":"/u","Driver":"local","Mode":"z","Options":["nosuid","nodev",
        "rbind"],"RW":false,"Propagation":"rprivate"}],"Dependencies":[],"NetworkSettings":{"Networks":{"none":{"Gateway":"",
        "IPAddress":"","IPPrefixLen":0,"IPv6Gateway":"","GlobalIPv6Address":"",
        "GlobalIPv6PrefixLen":0,"MacAddress":""}}},"IsInfra":false,"Config":{"Tty":false,
        "OpenStdin":false,"StopSignal":15,"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "container=podman","HOME=/","HOSTNAME=03b937775c67"],"Labels":null,"Annotations":{}},
        "HostConfig":{"LogConfig":{"Type":"none","Config":null,"Path":"","Tag":"",
        "Size":"-1B"},"NetworkMode":"none","PortBindings":{},"RestartPolicy":{"Name":"no",
        "MaximumRetryCount":0},"AutoRemove":true,"IpcMode":"shareable","PidMode":"private",
        "UTSMode":"private","UsernsMode":"private","CgroupMode":"private","Cgroups":"default",
        "IDMappings":{"UidMap":["0:100000:5000"],"GidMap":["0:100000:5000"]},"Privileged":false,
        "ReadonlyRootfs":false,"SecurityOpt":[],"Tmpfs":{},"Devices":[{"PathOnHost":"/dev/fuse",
        "PathInContainer":"/dev/fuse","CgroupPermissions":""}],"CapAdd":[]}}"#;

    #[test]
    fn reads_a_plain_container() {
        let web = read(WEB);
        assert_eq!(web.name, "web");
        assert!(web.is_running());
        assert_eq!(web.pid, Some(18276));
        assert_eq!(web.conmon_pid, Some(18264));
        assert_eq!(web.runtime, "runc");
        assert_eq!(web.image_name, "localhost/bb:1");
        assert_eq!(web.image.as_ref().unwrap().short(), "6b9a7da66579");
        assert_eq!(
            web.cgroup_path.as_ref().unwrap(),
            Path::new(&format!("/libpod_parent/libpod-{}", web.id))
        );
        assert!(!web.without_cgroup);

        assert_eq!(
            web.networks,
            [Attachment {
                name: "net1".into(),
                ip: Some("10.77.0.9".parse().unwrap()),
                prefix: 24,
                ip6: Some("fd77::3".parse().unwrap()),
                prefix6: 64,
                mac: Some("56:f7:95:dc:8b:bb".into()),
                gateway: Some("10.77.0.1".parse().unwrap()),
                gateway6: Some("fd77::1".parse().unwrap()),
            }]
        );
        assert_eq!(web.addresses().count(), 2);
        assert_eq!(web.network_mode, Mode::Bridge);
        assert_eq!(web.ipc_mode, Mode::Shareable);
        assert_eq!(web.pid_mode, Mode::Private);
        assert_eq!(web.uts_mode, Mode::Private);
        assert_eq!(web.user_mode, Mode::Host);
        assert_eq!(web.cgroup_mode, Mode::Private);

        assert_eq!(
            web.ports,
            [
                PublishedPort {
                    host_ip: None,
                    host_port: 8080,
                    container_port: 80,
                    protocol: "tcp".into(),
                    range: 1,
                },
                PublishedPort {
                    host_ip: Some("127.0.0.1".parse().unwrap()),
                    host_port: 9000,
                    container_port: 9000,
                    protocol: "udp".into(),
                    range: 3,
                },
            ]
        );

        let places: Vec<_> = web
            .mounts
            .iter()
            .map(|m| m.destination().to_str().unwrap())
            .collect();
        assert_eq!(places, ["/anon", "/data", "/mnt/h", "/scratch"]);
        assert!(
            matches!(&web.mounts[1], Mount::Volume { name, driver, read_only: false, .. }
            if name == "vol1" && driver == "local")
        );
        assert!(
            matches!(&web.mounts[2], Mount::Bind { source, read_only: true, .. }
            if source == Path::new("/etc/hosts"))
        );
        assert!(matches!(&web.mounts[3], Mount::Tmpfs { .. }));

        assert_eq!(web.rootfs.driver, "overlay");
        assert!(web.rootfs.upper.as_ref().unwrap().ends_with("diff"));
        assert!(web.rootfs.merged.as_ref().unwrap().ends_with("merged"));
        assert_eq!(web.rootfs.lower.len(), 1);
        assert!(web.static_dir.ends_with("userdata"));
        assert_eq!(web.secrets, ["sec1"]);
        assert!(web.environment_secrets.is_empty());
        assert!(web.health_check);
        assert_eq!(web.exec_sessions.len(), 1);
        assert_eq!(web.log_driver, "k8s-file");
        assert_eq!(web.restart_policy.name, "on-failure");
        assert_eq!(web.restart_policy.maximum_retries, 3);
        assert_eq!(web.annotations["an"], "no");
        assert_eq!(web.labels["l"], "m");
        assert!(web.capabilities.contains(&"CAP_CHOWN".to_owned()));
        assert_eq!(web.pod, None);
    }

    #[test]
    fn reads_what_is_the_hosts_and_rare_mounts() {
        let odd = read(ODD);
        assert!(odd.privileged && odd.tty && odd.interactive);
        for mode in [
            &odd.network_mode,
            &odd.pid_mode,
            &odd.ipc_mode,
            &odd.uts_mode,
            &odd.cgroup_mode,
        ] {
            assert_eq!(*mode, Mode::Host);
        }
        assert!(odd.networks.is_empty());
        assert!(
            odd.security_options
                .contains(&"seccomp=unconfined".to_owned())
        );
        let kinds: Vec<_> = odd
            .mounts
            .iter()
            .map(|mount| match mount {
                Mount::Other { what, .. } => what.as_str(),
                Mount::Image { image, .. } => image.as_str(),
                Mount::Overlay { lower, .. } => lower.to_str().unwrap(),
                Mount::Tmpfs { .. } => "tmpfs",
                _ => "?",
            })
            .collect();
        // at /dp, /img, /over and /t2
        assert_eq!(kinds, ["devpts", "localhost/multi:1", "/o1", "tmpfs"]);
    }

    #[test]
    fn does_not_take_another_containers_network_for_its_own() {
        let join = read(JOIN);
        assert!(matches!(&join.network_mode, Mode::Container(id) if id.starts_with("ace791f8")));
        assert!(matches!(join.pid_mode, Mode::Container(_)));
        assert!(join.networks.is_empty() && join.ports.is_empty());
        assert_eq!(join.dependencies.len(), 1);
        assert_eq!(join.environment_secrets, ["sec1"]);
    }

    #[test]
    fn reads_user_mappings_and_devices() {
        let mapped = read(MAPPED);
        assert_eq!(mapped.user_mode, Mode::Private);
        assert_eq!(
            mapped.uid_map,
            [IdMapping {
                container: 0,
                host: 100_000,
                length: 5000
            }]
        );
        assert_eq!(mapped.devices[0].host, Path::new("/dev/fuse"));
        assert_eq!(mapped.network_mode, Mode::None);
        assert!(mapped.networks.is_empty());
        assert!(mapped.auto_remove);
        assert_eq!(mapped.log_driver, "none");
        assert_eq!(mapped.log_path, None);
    }

    /// What Podman 5 answers on a path of version 5, or leaves out, does not stop us.
    #[test]
    fn takes_a_bare_answer() {
        let id = "a".repeat(64);
        let bare = read(&format!(
            r#"{{"Id":"{id}","Name":"x","State":{{"Status":"exited"}},"OCIRuntime":"crun","Mounts":null,
            "Config":{{"StopSignal":"SIGTERM","Entrypoint":["/x"],"Env":null}},
            "HostConfig":{{"NetworkMode":"pasta","PortBindings":null,"LogConfig":null}}}}"#
        ));
        assert_eq!(bare.status, Status::Exited);
        assert_eq!(bare.pid, None);
        assert_eq!(bare.image, None);
        assert_eq!(bare.network_mode, Mode::Other("pasta".into()));
    }

    #[test]
    fn crosses_the_wire() {
        for json in [WEB, ODD, JOIN, MAPPED] {
            let container = read(json);
            let sent = serde_json::to_string(&container).unwrap();
            assert_eq!(serde_json::from_str::<Container>(&sent).unwrap(), container);
        }
    }

    #[test]
    fn sees_who_listens() {
        let holder = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut port = PublishedPort {
            host_ip: None,
            host_port: holder.local_addr().unwrap().port(),
            container_port: 80,
            protocol: "tcp".into(),
            range: 1,
        };
        assert!(!port.is_free().unwrap());
        port.host_ip = Some("127.0.0.1".parse().unwrap());
        assert!(!port.is_free().unwrap());
        drop(holder);
        assert!(port.is_free().unwrap());
        // TEST-NET-1, RFC 5737: nobody's.
        port.host_ip = Some("192.0.2.1".parse().unwrap());
        assert!(port.is_free().is_err());
    }

    #[test]
    fn knows_when_ports_collide() {
        let port = |ip: Option<&str>, host_port, range, protocol: &str| PublishedPort {
            host_ip: ip.map(|ip| ip.parse().unwrap()),
            host_port,
            container_port: 80,
            protocol: protocol.into(),
            range,
        };
        let any = port(None, 8080, 1, "tcp");
        assert!(any.collides_with(&any));
        assert!(any.collides_with(&port(Some("10.0.0.1"), 8070, 11, "tcp")));
        assert!(!any.collides_with(&port(None, 8070, 10, "tcp")));
        assert!(!any.collides_with(&port(None, 8080, 1, "udp")));
        let here = port(Some("10.0.0.1"), 8080, 1, "tcp");
        assert!(!here.collides_with(&port(Some("10.0.0.2"), 8080, 1, "tcp")));
        // The last port there is.
        assert!(!any.collides_with(&port(None, 65535, 1, "tcp")));
        // As another host may say it: no port at all is taken for one.
        assert!(any.collides_with(&port(None, 8080, 0, "tcp")));
        assert!(!any.collides_with(&port(None, 8079, 0, "tcp")));
    }

    #[test]
    fn ranges_are_joined_as_far_as_there_are_numbers() {
        let port = |port, range| PublishedPort {
            host_ip: None,
            host_port: port,
            container_port: port,
            protocol: "tcp".into(),
            range,
        };
        let joined = PublishedPort::coalesce(vec![port(9, 3), port(1, 8)]);
        assert_eq!(joined, [port(1, 11)]);
        let apart = vec![port(1, 60_000), port(60_001, 60_000)];
        assert_eq!(PublishedPort::coalesce(apart.clone()), apart);
    }
}
