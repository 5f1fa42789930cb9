//! Other names for peers that a container's new host takes for itself.
//!
//! A program on the anchor that is connected to a published port by 127.0.0.1, and a container there
//! that goes through one, appear to the container as the gateway of its network: 10.88.0.1, say. The
//! new host has a network like it, and 10.88.0.1 is one of its own addresses: before any rule or
//! table of ours is asked, it would deliver the container's answers to itself (the table `local`).
//! The same goes for peers on the new host itself.
//!
//! So what is steered into a hop there, though its destination is local, goes under an *alias* of
//! its destination, and at the other end of the hop, before conntrack sees it, gets its real
//! destination back:
//!
//! ```text
//!   destination, into3:   ct status & (snat | dnat | confirmed) == confirmed fib daddr type local
//!                           ip daddr set ip daddr | 240.0.0.0              # 10.88.0.1 → 250.88.0.1
//!   anchor, unalias:      iifname "livemig*" ip daddr 240.0.0.0/4
//!                           ip daddr set ip saddr . ip daddr map @peers    # (10.88.0.5, 250.88.0.1)
//!                                                                          #         → 10.88.0.1
//! ```
//!
//! At both places the packet is rewritten without regard to connections: at the destination conntrack
//! has looked it up already, at the anchor it has yet to. The kernel mends the checksums as it goes
//! (`nft_payload_set_eval`); an ICMP error quotes a packet of the other direction, which has no alias.
//!
//! A packet whose connection is translated here has its destination changed after steering: that is
//! how it looks local now. It is left alone, as is the first packet of one that is about to be
//! translated ([`forward`](super::forward)): such a connection is not confirmed yet.
//!
//! An alias is the address with its first bits replaced: by those of 240.0.0.0/4 (reserved, RFC 1112,
//! section 4) or of fe00::/9 (reserved by the IETF, RFC 4291, section 2.4), which no host has. The bits
//! that are lost are found again by the container that the packet comes from.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustix::io::Errno;
use serde_json::{Value, json};

use super::ruleset::{self, Rules, UNALIAS, add, equal, payload, rule};
use super::{Entry, Flow, Result};
use crate::podman::Subnet;

/// Before everything of ours.
pub(super) const PRIORITY: i32 = -320;

/// The map of each family, with nftables' names of the family and its type of address.
const MAPS: [(&str, &str, &str); 2] = [
    ("ip", "ipv4_addr", "peers"),
    ("ip6", "ipv6_addr", "peers_ip6"),
];

/// What the first bits of an IPv4 address become, and how many they are.
const V4: (Ipv4Addr, u8) = (Ipv4Addr::new(240, 0, 0, 0), 4);
/// What the first bits of an IPv6 address become, and how many they are.
const V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0xfe00, 0, 0, 0, 0, 0, 0, 0), 9);
/// The other bits, which stay.
const V6_KEPT: u128 = u128::MAX >> V6.1;
/// How many peers of one migration are remembered. One that is left out is lost only if its address
/// is the destination's.
const LIMIT: usize = 4096;

/// The alias of an address.
fn alias(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(address) => Ipv4Addr::from(u32::from(address) | u32::from(V4.0)).into(),
        IpAddr::V6(address) => {
            Ipv6Addr::from(u128::from(address) & V6_KEPT | u128::from(V6.0)).into()
        }
    }
}

/// Peers of containers, by the container's address and their alias.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Peers(BTreeMap<(IpAddr, IpAddr), IpAddr>);

impl Peers {
    /// Those of these flows. Which of them the destination takes for itself, only it knows; the
    /// gateways of the container's subnets surely, so they come first.
    pub fn of<'a>(
        flows: impl IntoIterator<Item = &'a Flow, IntoIter: Clone>,
        subnets: &[Subnet],
    ) -> Peers {
        let flows = flows.into_iter();
        let is_gateway = |flow: &&Flow| subnets.iter().any(|s| s.gateway == Some(flow.peer()));
        let gateways = flows.clone().filter(is_gateway);
        let mut peers = BTreeMap::new();
        for flow in gateways.chain(flows) {
            let peer = flow.peer();
            if peers.len() < LIMIT && peer.is_ipv6() == flow.container.is_ipv6() {
                peers.entry((flow.container, alias(peer))).or_insert(peer);
            }
        }
        Peers(peers)
    }

    /// From here on, what these containers send out of a hop to an alias of these peers is for them.
    ///
    /// A few messages to the kernel. Doing it twice is doing it once.
    ///
    /// # Errors
    /// When the kernel refuses, as it does if the rules of no hop are installed.
    pub fn remember(&self) -> Result<()> {
        /// What fits into a message: a socket sends 212,992 bytes at once unless told otherwise.
        const AT_ONCE: usize = 512;
        let mut rules = Rules::open()?;
        let mut elements = self.0.iter().peekable();
        while elements.peek().is_some() {
            let some = elements.by_ref().take(AT_ONCE);
            let requests = some.map(|((container, alias), peer)| {
                let map = MAPS[usize::from(container.is_ipv6())].2;
                let key = [octets(*container), octets(*alias)].concat();
                ruleset::add_mapping(map, &key, &octets(*peer))
            });
            match rules.change("remember the peers of a container", requests.collect()) {
                // Another peer has this alias already, of an earlier container with this address.
                Err(error) if error.errno() == Some(Errno::EXIST) => {
                    tracing::warn!(%error, "a peer may not be found behind its alias");
                }
                outcome => outcome?,
            }
        }
        Ok(())
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The commands that make the maps and fill the chain that gives packets their destination back.
pub(super) fn commands() -> Vec<Value> {
    let mut commands = Vec::new();
    for (_, kind, map) in MAPS {
        commands.push(add(
            "map",
            json!({ "name": map, "type": [kind, kind], "map": kind }),
        ));
    }
    commands.push(ruleset::flush(UNALIAS));
    for ((ip, _, map), (prefix, length)) in MAPS.into_iter().zip(prefixes()) {
        let (source, destination) = (payload(ip, "saddr"), payload(ip, "daddr"));
        commands.push(rule(
            UNALIAS,
            &[
                ruleset::out_of_a_hop(),
                equal(
                    destination.clone(),
                    json!({ "prefix": { "addr": prefix, "len": length } }),
                ),
                json!({ "mangle": {
                    "key": destination,
                    "value": { "map": {
                        "key": { "concat": [source, destination] }, "data": format!("@{map}"),
                    } },
                } }),
            ],
        ));
    }
    commands
}

fn prefixes() -> [(IpAddr, u8); 2] {
    [(V4.0.into(), V4.1), (V6.0.into(), V6.1)]
}

/// The rules that give a packet's destination its alias if it is one of this host's own.
pub(super) fn rules(chain: &str) -> Vec<Value> {
    let rest = [Value::Null, json!(Ipv6Addr::from(V6_KEPT).to_string())];
    MAPS.into_iter()
        .zip(prefixes())
        .zip(rest)
        .map(|(((ip, ..), (prefix, _)), rest)| {
            let destination = payload(ip, "daddr");
            let kept = match rest {
                Value::Null => destination.clone(),
                mask => json!({ "&": [destination, mask] }),
            };
            rule(
                chain,
                &[
                    equal(
                        json!({ "meta": { "key": "nfproto" } }),
                        if ip == "ip" { "ipv4" } else { "ipv6" },
                    ),
                    equal(
                        json!({ "&": [
                            { "ct": { "key": "status" } }, ["snat", "dnat", "confirmed"],
                        ] }),
                        "confirmed",
                    ),
                    equal(
                        json!({ "fib": { "result": "type", "flags": ["daddr"] } }),
                        "local",
                    ),
                    json!({ "mangle": { "key": destination, "value": { "|": [kept, prefix] } } }),
                ],
            )
        })
        .collect()
}

/// Forgets the peers of containers that none of these connections, all that the kernel has, is
/// steered for any more.
///
/// # Errors
/// When the kernel cannot be asked, or refuses.
pub fn forget_unused(entries: &[Entry]) -> Result<()> {
    let steered: HashSet<IpAddr> = entries
        .iter()
        .filter(|entry| entry.mark.is_steered())
        .flat_map(|entry| [entry.original.source, entry.reply.source])
        .collect();
    let mut rules = Rules::open()?;
    for (.., map) in MAPS {
        for key in rules.keys(map)? {
            let container = match *key.as_slice() {
                [a, b, c, d, ..] if key.len() == 8 => IpAddr::from([a, b, c, d]),
                _ => match key.first_chunk::<16>() {
                    Some(octets) => IpAddr::from(*octets),
                    None => continue,
                },
            };
            if steered.contains(&container) {
                continue;
            }
            let gone = vec![ruleset::delete_element(map, &key)];
            match rules.change("forget the peers of a container", gone) {
                // Somebody was faster.
                Err(error) if error.errno() == Some(Errno::NOENT) => {}
                outcome => outcome?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_keeps_what_tells_hosts_of_a_network_apart() {
        for (address, expected) in [
            ("10.88.0.1", "250.88.0.1"),
            ("192.168.1.1", "240.168.1.1"),
            ("fd00:88::1", "fe00:88::1"),
            ("2001:db8::1", "fe01:db8::1"),
        ] {
            let address: IpAddr = address.parse().unwrap();
            assert_eq!(alias(address).to_string(), expected);
            assert_eq!(alias(alias(address)), alias(address));
        }
    }
}
