//! The door to the private readers: see [`crate::fuzzing`].

use serde::de::DeserializeOwned;

use super::client::{ContainerSummary, HostInfo};
use super::error::Error;
use super::events::Event;
use super::image::{InspectedImage, Loaded};
use super::inspect::{Container, Inspection};
use super::network::Network;
use super::request::{Purpose, read_fault};
use super::restore::{Report, Restored};
use super::volume::Volume;
use crate::fuzzing::read as read_again;

/// One of Podman's answers. What livemig makes of it can be sent to another host, and read there.
pub(crate) fn read(which: u8, json: &[u8]) {
    match which % 10 {
        0 => {
            if let Some(Ok(container)) = parsed::<Inspection>(json).map(Inspection::container) {
                sent(&container);
                let ports = &container.ports;
                for port in ports {
                    assert!(ports.iter().any(|other| other.collides_with(port)));
                }
                let _ = container.addresses().count() + container.volumes().count();
            }
        }
        1 => {
            if let Some(host) = parsed(json).and_then(HostInfo::read) {
                sent(&host);
            }
        }
        2 => {
            if let Some(Ok(entry)) = parsed(json).map(ContainerSummary::read) {
                sent(&entry);
            }
        }
        3 => drop(parsed(json).map(Event::read)),
        4 => drop(read_again::<Network>(json)),
        5 => drop(read_again::<Volume>(json)),
        6 => drop(parsed::<InspectedImage>(json)),
        7 => drop(parsed::<Loaded>(json)),
        8 => drop(parsed::<Report>(json).map(Restored::from)),
        _ => {
            let purpose = Purpose::new("test", "a reader");
            let status = hyper::StatusCode::INTERNAL_SERVER_ERROR;
            let fault: Error = read_fault(&purpose, status, json);
            assert!(!fault.to_string().is_empty());
        }
    }
}

fn parsed<T: DeserializeOwned>(json: &[u8]) -> Option<T> {
    serde_json::from_slice(json).ok()
}

fn sent<T: DeserializeOwned + serde::Serialize>(value: &T) {
    let text = serde_json::to_vec(value).expect("what was read can be written");
    read_again::<T>(&text).expect("and read again");
}

/// A container as Podman shows it, and a host that it could come to.
pub(crate) fn offered(inspect: &str) -> (Container, HostInfo) {
    let container = parsed::<Inspection>(inspect.as_bytes()).expect("Podman's words");
    let host = serde_json::json!({
        "podman_version": "5.8.6", "api_version": "5.8.6",
        "runtime": {"name": "runc", "path": "/usr/bin/runc", "version": ""},
        "cgroup_manager": "cgroupfs", "cgroup_version": 2, "network_backend": "netavark",
        "graph_driver": "overlay", "graph_root": "/var/lib/containers/storage",
        "run_root": "/run/containers/storage", "volume_root": null, "rootless": false,
        "arch": "amd64", "kernel": "", "hostname": "", "apparmor": false, "selinux": false,
    });
    let host = serde_json::from_value(host).expect("a host");
    (container.container().expect("a container"), host)
}
