//! How what the preflight found is shown: what was checked, what is wrong, what to do.

use livemig::criu::{Code, Finding};
use livemig::migration::Preflight;
use livemig::podman::{Container, Mount};

use crate::table::Table;

/// What a check is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Area {
    Hosts,
    Container,
    Image,
    Storage,
    Network,
    Connections,
}

impl Area {
    const ALL: [Area; 6] = [
        Area::Hosts,
        Area::Container,
        Area::Image,
        Area::Storage,
        Area::Network,
        Area::Connections,
    ];

    fn of(finding: &Finding) -> Area {
        match finding.code {
            Code::CriuMissing
            | Code::CriuTooOldForKernel
            | Code::CriuCheckFailed
            | Code::CriuOlderAtDestination
            | Code::LibcriuMissing
            | Code::RuntimeMismatch
            | Code::RuntimeMissing
            | Code::RuntimeVersionDiffers
            | Code::CpuFeaturesMissing
            | Code::CpuFeaturesDiffer
            | Code::ArchitectureMismatch
            | Code::NetworkLockMisplaced
            | Code::NetworkLockUnavailable
            | Code::KernelOlderAtDestination
            | Code::EngineUnavailable
            | Code::PostCopyUnavailable
            | Code::MemoryDoesNotFit
            | Code::Rootless => Area::Hosts,
            Code::NoImage | Code::ImageNameTaken => Area::Image,
            Code::StorageDriver
            | Code::VolumeDriver
            | Code::OverlayMount
            | Code::ImageMount
            | Code::VolumeExists
            | Code::BindSourceMissing
            | Code::SecretMissing
            | Code::BindNotAllowed
            | Code::SecretNotAllowed => Area::Storage,
            Code::NetworkMode
            | Code::NotForwarding
            | Code::SubnetTaken
            | Code::SubnetMismatch
            | Code::AddressInUse
            | Code::PortInUse
            | Code::PortAddress => Area::Network,
            Code::FlowNotKept => Area::Connections,
            _ => Area::Container,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Area::Hosts => "hosts",
            Area::Container => "container",
            Area::Image => "image",
            Area::Storage => "storage",
            Area::Network => "network",
            Area::Connections => "connections",
        }
    }

    /// What is said of it if nothing was found.
    fn in_order(self, preflight: &Preflight) -> String {
        let container = &preflight.container;
        let networks = &preflight.assessment.networks_to_make;
        match self {
            Area::Hosts => format!(
                "CRIU, kernel, runtime and processor fit; engine: {}",
                preflight.engine
            ),
            Area::Container => {
                "it can be taken apart from its host; its name and ID are free".to_owned()
            }
            Area::Image if preflight.assessment.image_present => "it is there".to_owned(),
            Area::Image => "it will be sent before the container stops".to_owned(),
            Area::Storage => storage(container),
            Area::Network if container.networks.is_empty() => "it has none".to_owned(),
            Area::Network if networks.is_empty() => {
                format!("{} free", addresses(container))
            }
            Area::Network => format!(
                "{} free; {} will be made",
                addresses(container),
                networks.join(", ")
            ),
            Area::Connections => match preflight.flows.len() {
                0 => "it has none".to_owned(),
                1 => "1 goes along".to_owned(),
                many => format!("{many} go along"),
            },
        }
    }
}

fn storage(container: &Container) -> String {
    let volumes: Vec<&str> = container.volumes().map(short).collect();
    let binds = container
        .mounts
        .iter()
        .filter(|mount| matches!(mount, Mount::Bind { .. }))
        .count();
    let mut parts = vec!["its changed files go along".to_owned()];
    if !volumes.is_empty() {
        parts.push(format!("so do its volumes ({})", volumes.join(", ")));
    }
    if binds > 0 {
        parts.push("what is mounted from the host is there".to_owned());
    }
    parts.join("; ")
}

/// The names of anonymous volumes are long and say nothing.
fn short(volume: &str) -> &str {
    match volume.get(..12) {
        Some(start) if volume.len() == 64 => start,
        _ => volume,
    }
}

fn addresses(container: &Container) -> String {
    let addresses: Vec<String> = container
        .addresses()
        .map(|address| address.to_string())
        .collect();
    let ports: Vec<String> = container
        .ports
        .iter()
        .map(|port| match port.range {
            0 | 1 => format!("{}/{}", port.host_port, port.protocol),
            range => format!(
                "{}-{}/{}",
                port.host_port,
                port.host_port + (range - 1),
                port.protocol
            ),
        })
        .collect();
    let addresses = addresses.join(", ");
    if ports.is_empty() {
        format!("{addresses} is")
    } else {
        format!("{addresses} and {} are", ports.join(", "))
    }
}

/// Prints what was checked and what came of it.
pub fn print(preflight: &Preflight, destination: &str) {
    let name = &preflight.container.name;
    let mut table = Table::new(&["", "checked", "result"]);
    for area in Area::ALL {
        let mut found = preflight
            .findings
            .iter()
            .filter(|finding| Area::of(finding) == area)
            .peekable();
        if found.peek().is_none() {
            // Of one that does not run nothing else is known.
            if preflight.container.is_running() {
                table.row([
                    "ok".to_owned(),
                    area.name().to_owned(),
                    area.in_order(preflight),
                ]);
            }
            continue;
        }
        for finding in found {
            let mark = if finding.refuses() { "no" } else { "warning" };
            let result = format!("{} ({})\n→ {}", finding.what, finding.code, finding.next);
            table.row([mark.to_owned(), area.name().to_owned(), result]);
        }
    }
    print!("{table}");
    if preflight.passes() {
        println!("`{name}` can move to {destination}");
    } else {
        println!("`{name}` cannot move to {destination}");
    }
}

/// The same for programs.
pub fn json(preflight: &Preflight, destination: &str) -> serde_json::Value {
    serde_json::json!({
        "container": preflight.container.name,
        "id": preflight.container.id,
        "destination": destination,
        "passes": preflight.passes(),
        "image_present": preflight.assessment.image_present,
        "networks_to_make": preflight.assessment.networks_to_make,
        "flows": preflight.flows.len(),
        "findings": preflight.findings,
    })
}
