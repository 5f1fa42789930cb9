//! The handle on one host's Podman, and the calls about containers and the host as a whole.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Method;
use podman_api::opts::{ContainerDeleteOpts, ContainerListOpts};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::error::{Error, Result};
use super::id::{ContainerId, ImageId, check_name};
use super::inspect::PublishedPort;
use super::request::{Call, Purpose, Query, Socket};

/// How long to wait for Podman at each point. Everything is local, so these are bounds on a host
/// in trouble, not on the work itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeouts {
    /// For the socket to accept a connection.
    pub connect: Duration,
    /// For the answer to a question or a small change.
    pub answer: Duration,
    /// For a checkpoint to begin to come: Podman dumps, packs and stages all of it first.
    pub checkpoint: Duration,
    /// For a restore to be over, counted from the last byte of the archive that Podman took.
    pub restore: Duration,
    /// For an image to be packed, or to be unpacked, counted likewise.
    pub image: Duration,
    /// For the next piece of an answer that has begun.
    pub stall: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            connect: Duration::from_secs(5),
            answer: Duration::from_secs(30),
            // A container of 100 GiB that is dumped to a disk at 200 MB/s.
            checkpoint: Duration::from_secs(600),
            restore: Duration::from_secs(600),
            image: Duration::from_secs(600),
            stall: Duration::from_secs(60),
        }
    }
}

/// Podman on one host, through its API socket. Cheap to clone; holds no connection.
#[derive(Debug, Clone)]
pub struct Client {
    pub(super) api: podman_api::Podman,
    pub(super) socket: Socket,
    pub(super) timeouts: Timeouts,
}

impl Client {
    /// A client of the socket at this path, commonly `/run/podman/podman.sock`. Nothing is
    /// connected to yet.
    pub fn new(socket: &Path) -> Client {
        Client::with_timeouts(socket, Timeouts::default())
    }

    /// Like [`Client::new`], with other time-outs.
    pub fn with_timeouts(socket: &Path, timeouts: Timeouts) -> Client {
        Client {
            // The crate's own version in the path is v4.3.1, which every Podman up to 5.8 answers
            // in the form that the crate understands. `adjust_api_version()` would break that.
            api: podman_api::Podman::unix(socket),
            socket: Socket::new(socket, timeouts.connect, timeouts.stall),
            timeouts,
        }
    }

    /// Runs one of podman-api's calls, with an end to the wait and errors of our own.
    pub(super) async fn api<T>(
        &self,
        purpose: &Purpose,
        wait: Duration,
        call: impl Future<Output = podman_api::Result<T>>,
    ) -> Result<T> {
        match timeout(wait, call).await {
            Err(_) => Err(purpose.timeout(wait)),
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => match from_api(purpose, error) {
                // hyper 0.14 hides why; connecting once more tells.
                Error::Connection { .. } => {
                    self.socket.connect(purpose).await?;
                    Err(purpose.connection("Podman closed it without an answer"))
                }
                error => Err(error),
            },
        }
    }

    /// A question that is answered soon.
    pub(super) fn ask<'a>(&self, purpose: Purpose, path: &'a str) -> Call<'a> {
        Call {
            purpose,
            method: Method::GET,
            path,
            query: Query::new(),
            wait: self.timeouts.answer,
        }
    }

    /// What this host's Podman is and uses.
    ///
    /// # Errors
    /// When Podman cannot be reached or does not answer in time.
    pub async fn host(&self) -> Result<HostInfo> {
        let purpose = Purpose::new("ask", "Podman about its host");
        let info = self
            .api(&purpose, self.timeouts.answer, self.api.info())
            .await?;
        HostInfo::read(info).ok_or_else(|| purpose.malformed("a part of the host is missing"))
    }

    /// The containers of this host; those that do not run as well if `all`.
    ///
    /// # Errors
    /// When Podman cannot be reached or does not answer in time.
    pub async fn list(&self, all: bool) -> Result<Vec<ContainerSummary>> {
        let purpose = Purpose::new("list", "containers");
        let options = ContainerListOpts::builder().all(all).build();
        let containers = self.api.containers();
        let listed = self
            .api(&purpose, self.timeouts.answer, containers.list(&options))
            .await?;
        listed
            .into_iter()
            .map(|entry| ContainerSummary::read(entry).map_err(|reason| purpose.malformed(reason)))
            .collect()
    }

    /// Whether there is a container of this name or ID, running or not.
    ///
    /// # Errors
    /// [`Error::Name`] if that can be neither; else when Podman cannot be asked.
    pub async fn exists(&self, name_or_id: &str) -> Result<bool> {
        check_name("container", name_or_id)?;
        let purpose = Purpose::new("look for", format!("container {name_or_id}"));
        let container = self.api.containers().get(name_or_id);
        self.api(&purpose, self.timeouts.answer, container.exists())
            .await
    }

    /// Starts a container anew, as `podman start` does; this is not a restore.
    ///
    /// # Errors
    /// When Podman refuses or cannot be asked.
    pub async fn start(&self, id: &ContainerId) -> Result<()> {
        let purpose = Purpose::new("start", format!("container {}", id.short()));
        let container = self.api.containers().get(id.as_str());
        self.api(&purpose, self.timeouts.restore, container.start(None))
            .await
    }

    /// Removes a container. Returns whether there was one.
    ///
    /// With `force` this works on a container whose cgroup is frozen: its processes are killed
    /// without being thawed (seen with runc and crun).
    ///
    /// # Errors
    /// When Podman refuses (a running container without `force`) or cannot be asked.
    pub async fn remove(&self, id: &ContainerId, options: RemoveOptions) -> Result<bool> {
        let purpose = Purpose::new("remove", format!("container {}", id.short()));
        let mut query = ContainerDeleteOpts::builder()
            .force(options.force)
            .volumes(options.volumes);
        if let Some(limit) = options.timeout {
            // Whole seconds, never fewer than were asked for.
            let seconds = limit.as_secs() + u64::from(limit.subsec_nanos() > 0);
            query = query.timeout(usize::try_from(seconds).unwrap_or(usize::MAX));
        }
        let query = query.build();
        let container = self.api.containers().get(id.as_str());
        let wait = self.timeouts.answer + options.timeout.unwrap_or_default();
        match self.api(&purpose, wait, container.delete(&query)).await {
            Ok(()) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The ports that the running containers of this host publish, each with the container's name.
    ///
    /// # Errors
    /// When Podman cannot be reached or does not answer in time.
    pub async fn published_ports(&self) -> Result<Vec<(String, PublishedPort)>> {
        let mut containers = self.list(false).await?;
        // One in the network namespace of another is listed with that one's ports, but without
        // networks. The same port cannot really be published twice.
        containers.sort_by_key(|container| container.networks.is_empty());
        let mut published: Vec<(String, PublishedPort)> = Vec::new();
        for container in containers {
            for port in container.ports {
                if !published.iter().any(|(_, known)| *known == port) {
                    published.push((container.name.clone(), port));
                }
            }
        }
        Ok(published)
    }

    /// Which addresses of a network are in use, and by whom: what Podman's own database says.
    ///
    /// # Errors
    /// When Podman cannot be asked. A container that goes away meanwhile is left out.
    pub async fn containers_on_network(&self, network: &str) -> Result<Vec<Allocation>> {
        let mut allocations = Vec::new();
        for summary in self.list(false).await? {
            if !summary.networks.iter().any(|name| name == network) {
                continue;
            }
            let container = match self.inspect(summary.id.as_str()).await {
                Ok(container) => container,
                Err(error) if error.is_not_found() => continue,
                Err(error) => return Err(error),
            };
            for attachment in &container.networks {
                if attachment.name != network {
                    continue;
                }
                let addresses = [
                    attachment.ip.map(IpAddr::V4),
                    attachment.ip6.map(IpAddr::V6),
                ];
                for address in addresses.into_iter().flatten() {
                    allocations.push(Allocation {
                        container: container.id.clone(),
                        name: container.name.clone(),
                        address,
                    });
                }
            }
        }
        Ok(allocations)
    }
}

/// How a container is removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemoveOptions {
    /// Kill it if it runs.
    pub force: bool,
    /// How long it may take to stop before it is killed; `None` is the container's own stop
    /// time-out (ten seconds as a rule), zero kills at once.
    pub timeout: Option<Duration>,
    /// Remove its anonymous volumes as well.
    pub volumes: bool,
}

/// An address of a network that is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allocation {
    /// By which container.
    pub container: ContainerId,
    /// Its name.
    pub name: String,
    /// The address.
    pub address: IpAddr,
}

/// What a host's Podman is and uses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostInfo {
    /// Podman's version, for example `5.8.6`.
    pub podman_version: String,
    /// The version of its API, for example `5.8.6`.
    pub api_version: String,
    /// The OCI runtime for containers that ask for no other.
    pub runtime: RuntimeInfo,
    /// `systemd` or `cgroupfs`.
    pub cgroup_manager: String,
    /// 1 or 2.
    pub cgroup_version: u8,
    /// `netavark` or `cni`.
    pub network_backend: String,
    /// The storage driver, for example `overlay`.
    pub graph_driver: String,
    /// Where storage is kept.
    pub graph_root: PathBuf,
    /// Where storage keeps what does not outlive a boot.
    pub run_root: PathBuf,
    /// Where named volumes are kept.
    pub volume_root: Option<PathBuf>,
    /// Whether Podman runs without root, in which case nothing can be checkpointed.
    pub rootless: bool,
    /// The processor's architecture in Go's words, for example `amd64`.
    pub arch: String,
    /// The kernel's release.
    pub kernel: String,
    /// The host's name.
    pub hostname: String,
    /// Whether AppArmor confines containers here.
    pub apparmor: bool,
    /// Whether SELinux does.
    pub selinux: bool,
}

/// An OCI runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuntimeInfo {
    /// `crun`, `runc`...
    pub name: String,
    /// The program.
    pub path: PathBuf,
    /// The first line of what it says about its version.
    pub version: String,
}

impl HostInfo {
    pub(super) fn read(info: podman_api::models::Info) -> Option<HostInfo> {
        let host = info.host?;
        let store = info.store?;
        let version = info.version?;
        let runtime = host.oci_runtime?;
        let security = host.security;
        Some(HostInfo {
            podman_version: version.version?,
            api_version: version.api_version.unwrap_or_default(),
            runtime: RuntimeInfo {
                name: runtime.name?,
                path: runtime.path.unwrap_or_default().into(),
                version: runtime
                    .version
                    .as_deref()
                    .and_then(|text| text.lines().next())
                    .unwrap_or_default()
                    .to_owned(),
            },
            cgroup_manager: host.cgroup_manager.unwrap_or_default(),
            cgroup_version: match host.cgroup_version.as_deref() {
                Some("v1") => 1,
                _ => 2,
            },
            network_backend: host.network_backend.unwrap_or_default(),
            graph_driver: store.graph_driver_name?,
            graph_root: store.graph_root?.into(),
            run_root: store.run_root.unwrap_or_default().into(),
            volume_root: store.volume_path.map(PathBuf::from),
            rootless: security.as_ref().and_then(|s| s.rootless).unwrap_or(false),
            arch: host.arch.unwrap_or_default(),
            kernel: host.kernel.unwrap_or_default(),
            hostname: host.hostname.unwrap_or_default(),
            apparmor: security
                .as_ref()
                .and_then(|s| s.apparmor_enabled)
                .unwrap_or(false),
            selinux: security
                .as_ref()
                .and_then(|s| s.selinux_enabled)
                .unwrap_or(false),
        })
    }

    /// Where Podman keeps its files about a container, and CRIU its logs: the container need not
    /// exist any more.
    pub fn static_dir(&self, id: &ContainerId) -> PathBuf {
        self.graph_root
            .join(format!("{}-containers", self.graph_driver))
            .join(id.as_str())
            .join("userdata")
    }
}

/// A line of the list of containers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerSummary {
    /// Its ID.
    pub id: ContainerId,
    /// Its name.
    pub name: String,
    /// The image it was made from, if it was made from one.
    pub image: Option<ImageId>,
    /// That image's name at the time.
    pub image_name: String,
    /// `running`, `exited`, `created`, `paused`...
    pub state: String,
    /// Its first process, if it runs.
    pub pid: Option<u32>,
    /// Its pod, if it is in one.
    pub pod: Option<String>,
    /// Whether it is a pod's infra container.
    pub infra: bool,
    /// Whether it is removed when it ends (`--rm`).
    pub auto_remove: bool,
    /// The networks it is on.
    pub networks: Vec<String>,
    /// What it publishes, or what the container whose network namespace it shares does.
    pub ports: Vec<PublishedPort>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

impl ContainerSummary {
    pub(super) fn read(
        entry: podman_api::models::ListContainer,
    ) -> std::result::Result<ContainerSummary, String> {
        let id: ContainerId = entry
            .id
            .unwrap_or_default()
            .parse()
            .map_err(|e: Error| e.to_string())?;
        let ports = entry
            .ports
            .unwrap_or_default()
            .into_iter()
            .filter_map(|port| {
                PublishedPort::read(
                    port.host_ip.as_deref().unwrap_or_default(),
                    port.host_port?,
                    port.container_port?,
                    port.range.unwrap_or(1),
                    port.protocol.as_deref().unwrap_or("tcp"),
                )
            })
            .flatten()
            .collect();
        Ok(ContainerSummary {
            id,
            name: entry
                .names
                .and_then(|names| names.into_iter().next())
                .unwrap_or_default(),
            image: entry.image_id.and_then(|id| id.parse().ok()),
            image_name: entry.image.unwrap_or_default(),
            state: entry.state.unwrap_or_default(),
            pid: entry
                .pid
                .and_then(|pid| u32::try_from(pid).ok())
                .filter(|pid| *pid != 0),
            pod: entry.pod.filter(|pod| !pod.is_empty()),
            infra: entry.is_infra.unwrap_or(false),
            auto_remove: entry.auto_remove.unwrap_or(false),
            networks: entry.networks.unwrap_or_default(),
            ports,
            labels: entry.labels.unwrap_or_default().into_iter().collect(),
        })
    }
}

/// Translates an error of podman-api.
pub(super) fn from_api(purpose: &Purpose, error: podman_api::Error) -> Error {
    match error {
        podman_api::Error::Fault { code, message } => {
            let (cause, message) = split_fault(&message);
            purpose.refused(code.as_u16(), cause, message)
        }
        podman_api::Error::SerdeJsonError(e) => purpose.malformed(e.to_string()),
        podman_api::Error::InvalidResponse(reason) => purpose.malformed(reason),
        other => purpose.connection(other.to_string()),
    }
}

/// podman-api joins Podman's two sentences, `message` and `cause`, with a colon, and as a rule
/// `message` ends with the cause already. Takes them apart again where it does.
fn split_fault(joined: &str) -> (String, String) {
    joined
        .match_indices(": ")
        .map(|(at, colon)| (&joined[..at], &joined[at + colon.len()..]))
        .find(|(message, cause)| !cause.is_empty() && message.ends_with(cause))
        .map_or_else(
            || (String::new(), joined.to_owned()),
            |(message, cause)| (cause.to_owned(), message.to_owned()),
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_joined_sentences_apart() {
        assert_eq!(
            split_fault(
                "no container with ID or name \"x\" found: no such container: no such container"
            ),
            (
                "no such container".into(),
                "no container with ID or name \"x\" found: no such container".into()
            )
        );
        assert_eq!(
            split_fault("no such volume: no such volume"),
            ("no such volume".into(), "no such volume".into())
        );
        assert_eq!(
            split_fault("just this"),
            (String::new(), "just this".into())
        );
    }

    #[tokio::test]
    async fn podman_apis_silence_about_a_missing_socket_is_broken() {
        let client = Client::new(Path::new("/nonexistent/podman.sock"));
        for error in [
            client.list(true).await.unwrap_err(),
            client.host().await.unwrap_err(),
            client.exists("web").await.unwrap_err(),
        ] {
            assert!(matches!(error, Error::Connect { .. }), "{error:?}");
        }
    }

    /// As Podman 5.8.6 gave it, shortened.
    #[test]
    fn reads_a_line_of_the_list() {
        let entry = serde_json::from_str(
            r#"{"AutoRemove":false,"Command":["/bin/sh"],"Created":"2026-11-22T20:23:17.569184214Z",
            "CreatedAt":"","CIDFile":"","Exited":false,"ExitedAt":-62135596800,"ExitCode":0,
            "ExposedPorts":null,"Id":"ace791f8ac0242df90dda73352f43f26ad32ffe00cbc945b0ff2032fcdac06bf",
            "Image":"localhost/bb:1","ImageID":"6b9a7da665791134c70756a2f5395381241363c140e70303bbc24d970b01304a",
            "IsInfra":false,"Labels":{"l":"m"},"Mounts":["/mnt/h","/data"],"Names":["web"],"Namespaces":{},
            "Networks":["net1"],"Pid":18276,"Pod":"","PodName":"","Ports":[
            {"host_ip":"","container_port":80,"host_port":8080,"range":1,"protocol":"tcp"},
            {"host_ip":"127.0.0.1","container_port":9000,"host_port":9000,"range":3,"protocol":"udp"}],
            "Restarts":0,"Size":null,"StartedAt":1795378997,"State":"running","Status":"starting"}"#,
        )
        .unwrap();
        let summary = ContainerSummary::read(entry).unwrap();
        assert_eq!(summary.name, "web");
        assert_eq!(summary.pid, Some(18276));
        assert_eq!(summary.pod, None);
        assert_eq!(summary.ports.len(), 2);
        assert_eq!(summary.ports[0].host_ip, None);
        assert_eq!(summary.ports[1].range, 3);
    }
}
