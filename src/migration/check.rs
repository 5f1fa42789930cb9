//! What stands in the way of a container, found before anything is changed.
//!
//! Each finding has a code that does not change, says what is wrong with whose name in it, and what to
//! do next. Everything that Podman or CRIU would refuse half-way belongs here: half-way is when the
//! container is frozen.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use ipnetwork::IpNetwork;
use serde_json::Value;

use super::agreed::INIT;
use super::arrival::forbidden;
use crate::agent::protocol::{Assessment, Offer};
use crate::conntrack::{CannotKeep, Flow};
use crate::criu::{self, Code, Features, Finding, Freezer, Side, processes};
use crate::netlink::Namespace;
use crate::netlink::sockets::{self, Kind, State};
use crate::podman::{Client, Container, HostInfo, Mode, Mount, Network, Status, Subnet};
use crate::runtime::setup;
use crate::{Config, Error, Result, tunnel};

/// Ends with an error if a finding says no.
///
/// # Errors
/// [`Error::Refused`] with all findings.
pub(crate) fn refuse(container: &str, destination: &str, findings: &[Finding]) -> Result<()> {
    if findings.iter().any(Finding::refuses) {
        return Err(Error::Refused {
            container: container.to_owned(),
            destination: destination.to_owned(),
            findings: findings.to_vec(),
        });
    }
    Ok(())
}

/// What the source sees of the container itself.
pub(super) fn at_source(
    container: &Container,
    host: &HostInfo,
    features: &Features,
    networks: &[Network],
    flows: &[Flow],
) -> Vec<Finding> {
    let mut findings = Vec::new();
    if !container.is_running() {
        let next = match container.status {
            Status::Paused => format!("podman unpause {}", container.name),
            _ => format!(
                "podman start {}, or move it the ordinary way: it has no connections to lose",
                container.name
            ),
        };
        let what = format!(
            "`{}` is {}, and only a running container can be moved",
            container.name, container.status
        );
        // Nothing else can be said of one that has no processes.
        return vec![Finding::refuse(Code::NotRunning, what, next)];
    }
    findings.extend(criu::check::host(
        Side::Source,
        features,
        &container.runtime,
    ));
    if host.rootless {
        findings.push(Finding::refuse(
            Code::Rootless,
            "Podman at the source is rootless, and CRIU cannot save connections there",
            "move containers of root's Podman",
        ));
    }
    findings.extend(not_dumpable(container));
    findings.extend(mounted(container));
    namespaces(container, &mut findings);
    storage(container, &mut findings);
    what_stays_behind(container, &mut findings);
    unkeepable(container, networks, flows, &mut findings);
    neighbours(container, networks, flows, &mut findings);
    findings
}

/// All processes of the container, those outside of its cgroup included.
fn processes_of(container: &Container, proc: &Path) -> criu::Result<Vec<u32>> {
    let Some(pid) = container.pid else {
        return Ok(Vec::new());
    };
    let freezer = Freezer::of(pid, Path::new("/"))?;
    let mut pids = processes::in_cgroup(freezer.path())?;
    pids.extend(processes::descendants(pid, proc)?);
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

/// Looks into every process of the container: CRIU would fail only when all is frozen. What cannot be
/// found out is left to CRIU.
fn not_dumpable(container: &Container) -> Vec<Finding> {
    let proc = Path::new("/proc");
    let look = || {
        let pids = processes_of(container, proc)?;
        let mut findings = criu::check::processes(&processes::obstacles(&pids, proc)?);
        if let Some(pid) = container.pid {
            findings.extend(criu::check::sockets(&processes::protocols(pid, proc)?));
        }
        Ok::<_, criu::Error>(findings)
    };
    look().unwrap_or_else(|error| {
        tracing::warn!(%error, "the container's processes cannot be looked into");
        Vec::new()
    })
}

/// What Podman's own import does to a container's volumes: it brings all that is in them, but not the
/// owner and the mode of the directory that they are. (Its unpacking leaves out the entry `.`: `Unpack` in
/// the archive package of containers/storage.) CRIU insists on the mode of what is open.
pub(super) fn by_podman(container: &Container) -> Vec<Finding> {
    let pids = processes_of(container, Path::new("/proc")).unwrap_or_default();
    let mut findings = Vec::new();
    for mount in &container.mounts {
        let Mount::Volume {
            name,
            source,
            destination,
            ..
        } = mount
        else {
            continue;
        };
        let Ok(root) = std::fs::metadata(source) else {
            continue;
        };
        let mode = root.mode() & 0o7777;
        if (root.uid(), root.gid(), mode) == (0, 0, 0o755) {
            continue;
        }
        let what = format!(
            "the root directory of volume {name} belongs to {}:{} with mode {mode:04o}, and Podman's \
             import will make it 0:0 with mode 0755",
            root.uid(),
            root.gid()
        );
        let next = "run `livemig setup` on both hosts for the direct engine, or have the data in a \
                    directory below";
        let open = mode != 0o755 && processes::are_in(destination, &pids, Path::new("/proc"));
        findings.push(if open {
            let what = format!("{what}, at which CRIU balks: a process has it open");
            Finding::refuse(Code::VolumeRoot, what, next)
        } else {
            Finding::warn(Code::VolumeRoot, what, next)
        });
    }
    findings
}

/// What the container has mounted that is not there again, or not as it was, when it is restored. The
/// runtime's own configuration tells: Podman says nothing of what it mounts by itself.
fn mounted(container: &Container) -> Vec<Finding> {
    let file = container.static_dir.join("config.json");
    let spec: Option<Value> = std::fs::read(&file)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    let Some(spec) = spec else {
        tracing::warn!(file = %file.display(), "the runtime's configuration cannot be read");
        return Vec::new();
    };
    let mut findings = Vec::new();
    for mount in spec["mounts"].as_array().into_iter().flatten() {
        let text = |field: &str| Path::new(mount[field].as_str().unwrap_or_default());
        let (source, destination) = (text("source"), text("destination"));
        if mount["type"] == "bind" {
            findings.extend(link(source, destination, Side::Source));
        }
        if ["passwd", "group"]
            .map(|name| container.static_dir.join(name))
            .contains(&source.into())
        {
            findings.push(Finding::refuse(
                Code::UsersMadeByPodman,
                format!(
                    "Podman has made {} for `{}`, and does not make it again for its restore",
                    destination.display(),
                    container.name
                ),
                "have the user and the group in the image's /etc/passwd and /etc/group, or run it \
                 without --read-only",
            ));
        }
    }
    findings
}

/// CRIU mounts the source of a bind mount by its name, without following it where that is a link, and
/// fails.
fn link(source: &Path, destination: &Path, side: Side) -> Option<Finding> {
    let target = std::fs::read_link(source).ok()?;
    let what = format!(
        "{}, mounted on {}, is a symbolic link at {side}, which CRIU cannot mount",
        source.display(),
        destination.display()
    );
    let target = source.parent().unwrap_or(source).join(target);
    let target = std::fs::canonicalize(&target).unwrap_or(target);
    let next = if destination == Path::new(INIT) {
        format!(
            "start it with --init-path {0}, or with `init_path = \"{0}\"` under [containers] in \
             containers.conf",
            target.display()
        )
    } else {
        format!("mount {} instead", target.display())
    };
    Some(Finding::refuse(Code::BindSourceLink, what, next))
}

fn namespaces(container: &Container, findings: &mut Vec<Finding>) {
    if let Some(pod) = &container.pod {
        findings.push(Finding::refuse(
            Code::InPod,
            format!("`{}` is part of the pod {pod}", container.name),
            "run it outside of a pod: its containers share namespaces that cannot be taken apart",
        ));
    }
    if !container.dependencies.is_empty() {
        findings.push(Finding::refuse(
            Code::DependsOnOthers,
            format!(
                "`{}` depends on {} other containers",
                container.name,
                container.dependencies.len()
            ),
            "start it without --requires and without the namespaces of another container",
        ));
    }
    if !matches!(
        container.network_mode,
        Mode::Bridge | Mode::None | Mode::Private
    ) {
        findings.push(Finding::refuse(
            Code::NetworkMode,
            format!(
                "`{}` uses the network of {}",
                container.name,
                owner(&container.network_mode)
            ),
            "run it on a bridge network (--network podman), whose address can move",
        ));
    }
    let others = [
        ("process", &container.pid_mode),
        ("IPC", &container.ipc_mode),
        ("UTS", &container.uts_mode),
        ("cgroup", &container.cgroup_mode),
    ];
    for (kind, mode) in others {
        // A cgroup namespace or host name of the host's is no state of the container.
        let matters = matches!(kind, "process" | "IPC");
        if matters && matches!(mode, Mode::Host | Mode::Container(_) | Mode::Path(_)) {
            findings.push(Finding::refuse(
                Code::SharedNamespace,
                format!(
                    "`{}` shares the {kind} namespace of {}",
                    container.name,
                    owner(mode)
                ),
                "run it with namespaces of its own",
            ));
        }
    }
    if !container.uid_map.is_empty() {
        findings.push(Finding::refuse(
            Code::UserNamespace,
            format!(
                "`{}` has a user namespace of its own, which CRIU cannot restore under Podman",
                container.name
            ),
            "run it without --userns and --uidmap",
        ));
    }
    if container.without_cgroup {
        findings.push(Finding::refuse(
            Code::NoCgroup,
            format!(
                "`{}` has no cgroup of its own, so it cannot be frozen as a whole",
                container.name
            ),
            "run it without --cgroups=disabled",
        ));
    }
}

fn owner(mode: &Mode) -> String {
    match mode {
        Mode::Host => "the host".to_owned(),
        Mode::Container(id) => format!("container {}", id.get(..12).unwrap_or(id)),
        Mode::Path(path) => path.display().to_string(),
        Mode::Other(kind) => kind.clone(),
        Mode::Private | Mode::Shareable | Mode::Bridge | Mode::None => "its own".to_owned(),
    }
}

fn storage(container: &Container, findings: &mut Vec<Finding>) {
    let rootfs = &container.rootfs;
    if rootfs.directory.is_some() || container.image.is_none() {
        findings.push(Finding::refuse(
            Code::NoImage,
            format!(
                "`{}` was made from a directory, not from an image",
                container.name
            ),
            "make an image of it (podman commit) and run that",
        ));
    } else if rootfs.driver != "overlay" || rootfs.upper.is_none() || rootfs.merged.is_none() {
        findings.push(Finding::refuse(
            Code::StorageDriver,
            format!(
                "`{}` lies on the storage driver {}, whose changed files cannot be read",
                container.name, rootfs.driver
            ),
            "use the storage driver overlay",
        ));
    }
    for mount in &container.mounts {
        match mount {
            Mount::Volume {
                name,
                driver,
                driver_options,
                ..
            } if driver != "local" || !driver_options.is_empty() => {
                findings.push(Finding::refuse(
                    Code::VolumeDriver,
                    format!("volume {name} is not a plain directory (driver {driver})"),
                    "mount it on the destination and give it to the container as a bind mount",
                ));
            }
            Mount::Overlay { destination, .. } => findings.push(Finding::refuse(
                Code::OverlayMount,
                format!(
                    "the writable layer over {} does not move",
                    destination.display()
                ),
                "mount it without :O",
            )),
            Mount::Image { image, destination } => findings.push(Finding::refuse(
                Code::ImageMount,
                format!(
                    "the image {image} mounted on {} does not move",
                    destination.display()
                ),
                "copy the files into the container's own image",
            )),
            _ => {}
        }
    }
    if !container.devices.is_empty() {
        let devices: Vec<String> = container
            .devices
            .iter()
            .map(|device| device.host.display().to_string())
            .collect();
        findings.push(Finding::warn(
            Code::Devices,
            format!(
                "`{}` was given devices ({}); CRIU can save few of them",
                container.name,
                devices.join(", ")
            ),
            "expect a refusal by CRIU, which leaves the container running here",
        ));
    }
}

fn what_stays_behind(container: &Container, findings: &mut Vec<Finding>) {
    if !container.exec_sessions.is_empty() {
        findings.push(Finding::warn(
            Code::ExecSessions,
            format!(
                "{} sessions of `podman exec` in `{}` end with the move",
                container.exec_sessions.len(),
                container.name
            ),
            "leave them first",
        ));
    }
    if container.health_check {
        findings.push(Finding::warn(
            Code::HealthCheck,
            format!(
                "the timer of `{}`'s health check does not move",
                container.name
            ),
            "run `podman healthcheck run` from a timer of your own there",
        ));
    }
    if !matches!(
        container.log_driver.as_str(),
        "k8s-file" | "json-file" | "none" | "passthrough"
    ) {
        findings.push(Finding::warn(
            Code::LogDriver,
            format!(
                "what `{}` has logged so far stays here (log driver {})",
                container.name, container.log_driver
            ),
            "it is still in the journal of this host",
        ));
    }
}

/// Connections that cannot come along are named, each with its reason.
fn unkeepable(
    container: &Container,
    networks: &[Network],
    flows: &[Flow],
    findings: &mut Vec<Finding>,
) {
    let subnets = subnets(networks);
    for flow in flows {
        if let Err(reason) = flow.keepable(&subnets) {
            findings.push(Finding::warn(
                Code::FlowNotKept,
                format!(
                    "the connection {} of `{}` will break: {reason}",
                    flow.seen, container.name
                ),
                "connect through the published port from another host",
            ));
        }
    }
}

/// Connections to peers on the container's own networks that are not among the flows. They do not
/// pass the host, whose connection tracking knows nothing of them unless it looks into bridges
/// (br_netfilter): only the container's sockets tell.
fn neighbours(
    container: &Container,
    networks: &[Network],
    flows: &[Flow],
    findings: &mut Vec<Finding>,
) {
    let listed = container.pid.map(|pid| {
        let namespace = Namespace::of_pid(pid)?;
        sockets::list(&namespace)
    });
    let sockets = match listed {
        Some(Ok(sockets)) => sockets,
        Some(Err(error)) => {
            tracing::warn!(%error, "the container's sockets cannot be listed");
            return;
        }
        None => return,
    };
    let subnets = subnets(networks);
    for socket in sockets {
        // A socket for both families shows a peer of IPv4 in the form of IPv6.
        let peer = socket.remote.ip().to_canonical();
        let on_network = subnets.iter().any(|subnet| subnet.subnet.contains(peer));
        let gateway = subnets.iter().any(|subnet| subnet.gateway == Some(peer));
        let own = container.addresses().any(|address| address == peer);
        let ends = [
            SocketAddr::new(socket.local.ip().to_canonical(), socket.local.port()),
            SocketAddr::new(peer, socket.remote.port()),
        ];
        let known = flows.iter().any(|flow| {
            let seen = [flow.seen.from(), flow.seen.to()];
            seen == ends || seen == [ends[1], ends[0]]
        });
        let over = matches!(socket.state, State::TimeWait | State::Listen);
        if !on_network || gateway || own || known || over || socket.remote.port() == 0 {
            continue;
        }
        let protocol = match socket.kind {
            Kind::Tcp => "tcp",
            Kind::Udp => "udp",
        };
        findings.push(Finding::warn(
            Code::FlowNotKept,
            format!(
                "the connection {protocol} {} ↔ {} of `{}` will break: {}",
                ends[0],
                ends[1],
                container.name,
                CannotKeep::PeerOnBridge
            ),
            "have the two talk through a published port of this host instead",
        ));
    }
}

/// The subnets of a container's networks.
pub(super) fn subnets(networks: &[Network]) -> Vec<Subnet> {
    networks
        .iter()
        .flat_map(|network| &network.subnets)
        .cloned()
        .collect()
}

/// What the destination sees of a container that would like to come. Changes nothing.
pub(crate) async fn at_destination(
    podman: &Client,
    offer: &Offer,
    config: &Config,
) -> Result<Assessment> {
    let container = &offer.container;
    let (host, features) = futures::join!(podman.host(), Features::of_this_host());
    let host = host?;
    let mut findings = criu::check::host(Side::Destination, &features, &container.runtime);
    findings.extend(criu::check::pair(
        &offer.features,
        &features,
        &container.runtime,
        &host.runtime.name,
    ));
    if host.rootless {
        findings.push(Finding::refuse(
            Code::Rootless,
            "Podman at the destination is rootless, and CRIU cannot restore connections there",
            "run the agent as root, on root's Podman",
        ));
    }
    forwarding(&mut findings)?;
    identity(podman, container, &mut findings).await?;
    let image_present = image(podman, container, &mut findings).await?;
    let networks_to_make = networks(podman, offer, &mut findings).await?;
    ports(podman, container, &mut findings).await?;
    mounts(podman, container, &mut findings).await?;
    secrets(podman, container, &mut findings).await?;
    findings.extend(forbidden(&config.arrivals, container, &host));
    let direct = setup::wrapper(config, &host).is_some();
    Ok(Assessment {
        findings,
        image_present,
        networks_to_make,
        host,
        direct,
        room: room(config),
        fetches: features
            .criu
            .filter(|criu| criu.lazy_pages)
            .map(|criu| criu.version),
    })
}

/// A host that has never had a container may not forward yet: Podman switches that on with the first.
fn forwarding(findings: &mut Vec<Finding>) -> Result<()> {
    match tunnel::check_forwarding() {
        Err(tunnel::Error::NotForwarding) => findings.push(Finding::refuse(
            Code::NotForwarding,
            "the destination does not forward IPv4 packets (net.ipv4.ip_forward is 0)",
            "sysctl -w net.ipv4.ip_forward=1 there, as Podman does with a host's first container",
        )),
        other => other?,
    }
    Ok(())
}

/// How much of a container's memory this host can take at once: what its file system in memory has room for,
/// and it has memory for (`MemAvailable` in proc_meminfo(5)).
fn room(config: &Config) -> u64 {
    let file_system = rustix::fs::statvfs(&config.memory_dir);
    let file_system = file_system.map_or(0, |it| it.f_bavail.saturating_mul(it.f_frsize));
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = text.lines().find_map(|line| {
        let line = line.strip_prefix("MemAvailable:")?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    });
    file_system.min(available.unwrap_or(0) << 10)
}

async fn identity(
    podman: &Client,
    container: &Container,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    if podman.exists(container.id.as_str()).await? {
        findings.push(Finding::refuse(
            Code::IdInUse,
            format!(
                "the destination has a container with the ID {} already",
                container.id.short()
            ),
            format!(
                "podman rm {} there, if it is a leftover",
                container.id.short()
            ),
        ));
    } else if podman.exists(&container.name).await? {
        findings.push(Finding::refuse(
            Code::NameInUse,
            format!(
                "the destination has a container called `{}` already",
                container.name
            ),
            format!("rename it there: podman rename {} NEW-NAME", container.name),
        ));
    }
    Ok(())
}

/// Whether the container's exact image is there under its name.
async fn image(
    podman: &Client,
    container: &Container,
    findings: &mut Vec<Finding>,
) -> Result<bool> {
    let Some(id) = &container.image else {
        return Ok(false);
    };
    let by_name = podman.image(&container.image_name).await?;
    match by_name {
        Some(image) if image.id == *id => Ok(true),
        Some(_) => {
            findings.push(Finding::refuse(
                Code::ImageNameTaken,
                format!(
                    "at the destination, {} is the name of another image",
                    container.image_name
                ),
                format!(
                    "rename that one there: podman tag {0} OTHER-NAME && podman untag {0}",
                    container.image_name
                ),
            ));
            Ok(true)
        }
        None => Ok(false),
    }
}

/// The networks that have to be made; what is wrong with those that are there.
async fn networks(
    podman: &Client,
    offer: &Offer,
    findings: &mut Vec<Finding>,
) -> Result<Vec<String>> {
    let mut to_make = Vec::new();
    let taken = subnets_in_use(podman).await?;
    for attachment in &offer.container.networks {
        let name = &attachment.name;
        let addresses: Vec<IpAddr> = attachment
            .ip
            .map(IpAddr::V4)
            .into_iter()
            .chain(attachment.ip6.map(IpAddr::V6))
            .collect();
        let Some(network) = podman.network(name).await? else {
            let Some(wanted) = offer.networks.iter().find(|network| network.name == *name) else {
                continue;
            };
            for subnet in &wanted.subnets {
                if let Some(other) = taken.iter().find(|taken| overlap(**taken, subnet.subnet)) {
                    findings.push(Finding::refuse(
                        Code::SubnetTaken,
                        format!("network {name} ({}) does not fit there: the destination uses {other}", subnet.subnet),
                        "give the network another subnet on the source, or free this one at the destination",
                    ));
                }
            }
            to_make.push(name.clone());
            continue;
        };
        for address in &addresses {
            if !network.contains(*address) {
                findings.push(Finding::refuse(
                    Code::SubnetMismatch,
                    format!(
                        "{address} lies in no subnet that network {name} has at the destination"
                    ),
                    format!("give network {name} the same subnet on both hosts"),
                ));
            }
        }
        for lease in podman.containers_on_network(name).await? {
            if addresses.contains(&lease.address) {
                findings.push(Finding::refuse(
                    Code::AddressInUse,
                    format!(
                        "the address {} belongs to container `{}` at the destination",
                        lease.address, lease.name
                    ),
                    format!("stop `{}` there, or give it another address", lease.name),
                ));
            }
        }
    }
    Ok(to_make)
}

/// The subnets that Podman gives to no further network: those of its networks, up or not, and those
/// that the host itself is in.
async fn subnets_in_use(podman: &Client) -> Result<Vec<IpNetwork>> {
    let mut subnets = tunnel::networks_of_host().await?;
    for name in podman.networks().await? {
        let network = podman.network(&name).await?;
        let own = network.iter().flat_map(|network| &network.subnets);
        subnets.extend(own.map(|subnet| subnet.subnet));
    }
    Ok(subnets)
}

fn overlap(a: IpNetwork, b: IpNetwork) -> bool {
    match (a, b) {
        (IpNetwork::V4(a), IpNetwork::V4(b)) => a.overlaps(b),
        (IpNetwork::V6(a), IpNetwork::V6(b)) => a.overlaps(b),
        _ => false,
    }
}

/// Ports that another container publishes, or that a program listens on.
async fn ports(podman: &Client, container: &Container, findings: &mut Vec<Finding>) -> Result<()> {
    let published = podman.published_ports().await?;
    for port in &container.ports {
        let named = format!("{}/{}", port.host_port, port.protocol);
        if let Some((holder, _)) = published
            .iter()
            .find(|(_, other)| port.collides_with(other))
        {
            findings.push(Finding::refuse(
                Code::PortInUse,
                format!("port {named} is published by container `{holder}` at the destination"),
                format!("stop `{holder}` there"),
            ));
            continue;
        }
        match port.is_free() {
            Ok(true) => {}
            Ok(false) => findings.push(Finding::refuse(
                Code::PortInUse,
                format!("a program listens on port {named} at the destination"),
                format!(
                    "find it there with `ss -lnp 'sport = :{}'`; if it is podman, restart podman.service",
                    port.host_port
                ),
            )),
            Err(error) => findings.push(Finding::refuse(
                Code::PortAddress,
                format!("port {named} cannot be published at the destination: {error}"),
                "publish it on all addresses (-p PORT:PORT), or on one that both hosts have",
            )),
        }
    }
    Ok(())
}

/// Volumes must not be there yet, sources of bind mounts have to be.
async fn mounts(podman: &Client, container: &Container, findings: &mut Vec<Finding>) -> Result<()> {
    for mount in &container.mounts {
        match mount {
            Mount::Volume { name, .. } if podman.volume_exists(name).await? => findings.push(Finding::refuse(
                Code::VolumeExists,
                format!("the destination has a volume {name} already, and what is in it would be lost"),
                format!("remove or rename it there: podman volume rm {name}"),
            )),
            Mount::Bind { source, destination, .. } if !is_made_by_podman(source, container) && !source.exists() => {
                findings.push(Finding::refuse(
                    Code::BindSourceMissing,
                    format!("{}, mounted on {}, is not there at the destination", source.display(), destination.display()),
                    format!("put {} there; livemig does not copy bind mounts", source.display()),
                ));
            }
            Mount::Bind { source, destination, .. } => {
                findings.extend(link(source, destination, Side::Destination));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Podman looks the mounted ones up when it restores; those that were environment variables are in
/// the container's memory, and needed only when it is started anew.
async fn secrets(
    podman: &Client,
    container: &Container,
    findings: &mut Vec<Finding>,
) -> Result<()> {
    for name in &container.secrets {
        if !podman.secret_exists(name).await? {
            findings.push(Finding::refuse(
                Code::SecretMissing,
                format!("the secret {name} is not there at the destination"),
                format!("create it there: podman secret create {name} FILE"),
            ));
        }
    }
    for name in &container.environment_secrets {
        if !podman.secret_exists(name).await? {
            findings.push(Finding::warn(
                Code::SecretMissing,
                format!("the secret {name} is not there at the destination, where the container can run but not be started anew"),
                format!("create it there: podman secret create {name} FILE"),
            ));
        }
    }
    Ok(())
}

/// Podman mounts some files of its own making, which it makes again at the destination.
fn is_made_by_podman(source: &Path, container: &Container) -> bool {
    source.starts_with(&container.static_dir)
        || source.to_string_lossy().contains(container.id.as_str())
}
