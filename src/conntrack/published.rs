//! What matches packets to the ports that are published for a container.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::hold::{HeldPorts, PortProtocol};
use super::ruleset::{equal, ip, payload};

/// nftables' name of a protocol.
pub(super) fn name(protocol: PortProtocol) -> &'static str {
    match protocol {
        PortProtocol::Tcp => "tcp",
        PortProtocol::Udp => "udp",
    }
}

/// A list of statements for each address that ports of a protocol are bound to: all that goes to one
/// of these ports of this host.
pub(super) fn matches(ports: &[HeldPorts], protocol: PortProtocol) -> Vec<Vec<Value>> {
    let mut by_address: BTreeMap<Option<IpAddr>, Vec<Value>> = BTreeMap::new();
    for ports in ports.iter().filter(|p| p.protocol == protocol) {
        by_address
            .entry(ports.address.filter(|a| !a.is_unspecified()))
            .or_default()
            .push(if ports.first == ports.last {
                json!(ports.first)
            } else {
                json!({ "range": [ports.first, ports.last] })
            });
    }
    by_address
        .into_iter()
        .map(|(address, ports)| {
            let mut statements = vec![
                equal(payload(name(protocol), "dport"), json!({ "set": ports })),
                equal(
                    json!({ "fib": { "result": "type", "flags": ["daddr"] } }),
                    json!("local"),
                ),
            ];
            if let Some(address) = address {
                statements.insert(0, equal(payload(ip(&address), "daddr"), json!(address)));
            }
            statements
        })
        .collect()
}
