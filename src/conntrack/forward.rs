//! New connections that are carried to another host, after the container that they are for.
//!
//! Connections that a container has follow it by their marks. A new one to its old host has no mark
//! yet and would be refused there. With forwarding it gets one when it begins, and is translated as
//! Podman would translate it there; from then on it is like the others:
//!
//! ```text
//!   old host                                         next host
//!   arrivals   to a published port: mark := hop 3    out of hop 1, to a port of the container:
//!   steer      mark ─▶ hop 3                           mark := answers go to hop 1
//!   forward    destination := the container     ═══▶ guard lets it pass, as it does all whose
//!   translate  source := the tunnel's own address      answers go where it came from
//!              if only this host can answer it
//! ```
//!
//! A host in the middle does both: what comes out of a hop for the container goes on into the next.
//!
//! One [`Forwarding`] is all that a host does for one container. Its rules are made from it as a
//! whole, each time that it changes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::hold::{HeldPorts, PortProtocol};
use super::published::{self, name};
use super::ruleset::{
    self, ARRIVALS, FORWARD, Rules, TRANSLATE, add_empty, begins, equal, ip, not_steered, payload,
    rule,
};
use super::{Direction, Mark, Result};
use crate::podman::ContainerId;
use crate::tunnel::HopId;

/// Published ports, and what they are inside the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForwardedPorts {
    /// On the host.
    pub host: HeldPorts,
    /// The container's port behind the first of them; the others follow.
    pub inside: u16,
}

impl ForwardedPorts {
    /// The container's ports, as nftables writes a port or a range.
    fn inside(&self) -> Value {
        let last = self.inside.saturating_add(self.host.last - self.host.first);
        if last == self.inside {
            json!(self.inside)
        } else {
            json!({ "range": [self.inside, last] })
        }
    }
}

/// Where new connections go on to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Onward {
    /// Into this hop.
    pub hop: HopId,
    /// Whether also those that begin at the ports of this host; otherwise only those that come out
    /// of a hop.
    pub own: bool,
    /// What stands for sources that only this host can answer: this end's addresses of the tunnel.
    pub tunnel: Vec<IpAddr>,
    /// Those sources: address and length of the prefix.
    pub hidden: Vec<(IpAddr, u8)>,
}

/// How new connections of one container go through this host. It is a value that a file can keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forwarding {
    /// The container.
    pub container: ContainerId,
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The ports that are published for it.
    pub ports: Vec<ForwardedPorts>,
    /// The hops that they may come out of.
    pub from: BTreeSet<HopId>,
    /// Where they go on to; nothing if the container is here.
    pub to: Option<Onward>,
}

impl Forwarding {
    /// Whether there is nothing to be done for it.
    pub fn is_idle(&self) -> bool {
        self.from.is_empty() && self.to.as_ref().is_none_or(|to| !to.own)
    }

    /// The hops that it needs.
    pub fn hops(&self) -> BTreeSet<HopId> {
        let to = self.to.iter().map(|to| to.hop);
        self.from.iter().copied().chain(to).collect()
    }

    fn chain(&self) -> String {
        format!("forward_{}", self.container.short())
    }

    fn next_chain(&self) -> String {
        format!("{}_next", self.chain())
    }

    fn destination_chain(&self) -> String {
        format!("{}_destination", self.chain())
    }

    fn source_chain(&self) -> String {
        format!("{}_source", self.chain())
    }

    /// What jumps goes before what is jumped to.
    fn chains(&self) -> [String; 4] {
        [
            self.chain(),
            self.next_chain(),
            self.destination_chain(),
            self.source_chain(),
        ]
    }

    /// Makes the rules, in place of those that there are for this container.
    ///
    /// # Errors
    /// When `nft` cannot be run, or refuses.
    pub async fn install(&self) -> Result<()> {
        let mut commands = self.base().await?;
        commands.push(ruleset::flush(&self.chain()));
        commands.extend(self.arrivals(&self.chain()));
        ruleset::apply("carry new connections to another host", commands).await
    }

    /// Makes the rules that [`Forwarding::switch`] puts in place of those that there are.
    ///
    /// # Errors
    /// When `nft` cannot be run, or refuses.
    pub async fn prepare(&self) -> Result<()> {
        let mut commands = self.base().await?;
        commands.extend(self.arrivals(&self.next_chain()));
        ruleset::apply("prepare to carry new connections", commands).await
    }

    /// From here on, the rules hold that [`Forwarding::prepare`] has made. One message to the kernel.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or refuses.
    pub fn switch(&self) -> Result<()> {
        Ok(Rules::open()?.change(
            "carry new connections from here on",
            vec![
                ruleset::flush_chain(&self.chain()),
                ruleset::jump_rule(&self.chain(), &self.next_chain()),
            ],
        )?)
    }

    /// Removes the rules. Connections that have begun go on. It is no error if there are none.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or refuses.
    pub async fn remove(&self) -> Result<()> {
        const DOING: &str = "carry no more new connections";
        let chains = self.chains();
        ruleset::blocking(DOING, move |rules| {
            rules.remove(DOING, &chains, Vec::new)?;
            rules.remove_unused()
        })
        .await
    }

    /// The chains, with the rules that only concern connections that are carried on already.
    async fn base(&self) -> Result<Vec<Value>> {
        let own = self.chain();
        let present = ruleset::blocking("list chains", move |rules| {
            Ok(rules.chains()?.contains(&own))
        })
        .await?;
        let mut commands = ruleset::base();
        if present {
            commands.push(ruleset::flush(&self.destination_chain()));
            commands.push(ruleset::flush(&self.source_chain()));
        } else {
            for chain in self.chains() {
                commands.extend(add_empty(&chain));
            }
            commands.extend(ruleset::jumps(ARRIVALS, &self.chain()));
            commands.extend(ruleset::jumps(FORWARD, &self.destination_chain()));
            let source = self.source_chain();
            let jump = json!({ "jump": { "target": source } });
            commands.push(ruleset::named_rule(TRANSLATE, &source, &[jump]));
        }
        commands.push(ruleset::flush(&self.next_chain()));
        if let Some(to) = &self.to {
            commands.extend(self.translation(to));
        }
        Ok(commands)
    }

    /// The rules that give a new connection its mark.
    fn arrivals(&self, chain: &str) -> Vec<Value> {
        let onward = self
            .to
            .as_ref()
            .map(|to| Mark::to(Direction::Original, to.hop));
        let mut commands = Vec::new();
        for from in &self.from {
            let mark = Mark::to(Direction::Reply, *from);
            let mark = mark.with(onward.unwrap_or(mark), Mark::mask(Direction::Original));
            for address in &self.addresses {
                for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
                    let of = self.ports.iter().filter(|p| p.host.protocol == protocol);
                    let ports: Vec<Value> = of.map(ForwardedPorts::inside).collect();
                    if ports.is_empty() {
                        continue;
                    }
                    commands.push(rule(
                        chain,
                        &[
                            equal(json!({ "meta": { "key": "iifname" } }), from.interface()),
                            equal(payload(ip(address), "daddr"), address),
                            equal(payload(name(protocol), "dport"), json!({ "set": ports })),
                            begins(),
                            not_steered(),
                            set_mark(mark),
                        ],
                    ));
                }
            }
        }
        if let Some(to) = self.to.as_ref().filter(|to| to.own) {
            let held: Vec<HeldPorts> = self.ports.iter().map(|ports| ports.host).collect();
            for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
                for mut statements in published::matches(&held, protocol) {
                    statements.extend([
                        begins(),
                        not_steered(),
                        set_mark(Mark::to(Direction::Original, to.hop)),
                    ]);
                    commands.push(rule(chain, &statements));
                }
            }
        }
        commands
    }

    /// The rules that translate what is carried from the ports of this host into the hop.
    fn translation(&self, to: &Onward) -> Vec<Value> {
        let mut commands = Vec::new();
        let carried = equal(
            json!({ "&": [
                { "ct": { "key": "mark" } }, Mark::mask(Direction::Original).bits(),
            ] }),
            Mark::to(Direction::Original, to.hop).bits(),
        );
        for six in [false, true] {
            // The first of a family, as Podman does it.
            let Some(address) = self.addresses.iter().find(|a| a.is_ipv6() == six) else {
                continue;
            };
            let family = ip(address);
            for ports in &self.ports {
                for mut statements in published::matches(&[ports.host], ports.host.protocol) {
                    let nfproto = if six { "ipv6" } else { "ipv4" };
                    let nfproto = equal(json!({ "meta": { "key": "nfproto" } }), nfproto);
                    statements.insert(0, nfproto);
                    statements.push(carried.clone());
                    statements.push(json!({ "dnat": translated(family, address, ports) }));
                    commands.push(rule(&self.destination_chain(), &statements));
                }
            }
            let Some(tunnel) = to.tunnel.iter().find(|a| a.is_ipv6() == six) else {
                continue;
            };
            let hidden = to.hidden.iter().filter(|(a, _)| a.is_ipv6() == six);
            for (source, length) in hidden {
                commands.push(rule(
                    &self.source_chain(),
                    &[
                        equal(json!({ "meta": { "key": "oifname" } }), to.hop.interface()),
                        carried.clone(),
                        equal(
                            payload(family, "saddr"),
                            json!({ "prefix": { "addr": source, "len": length } }),
                        ),
                        json!({ "snat": { "family": family, "addr": tunnel } }),
                    ],
                ));
            }
        }
        commands
    }
}

/// The destination that packets to these ports get.
fn translated(family: &str, address: &IpAddr, ports: &ForwardedPorts) -> Value {
    let HeldPorts { first, last, .. } = ports.host;
    if ports.inside == first {
        return json!({ "family": family, "addr": address });
    }
    let port = if first == last {
        json!(ports.inside)
    } else {
        let pairs: Vec<_> = (first..=last)
            .zip(ports.inside..=u16::MAX)
            .map(|(host, inside)| json!([host, inside]))
            .collect();
        json!({ "map": {
            "key": payload(name(ports.host.protocol), "dport"), "data": { "set": pairs },
        } })
    };
    json!({ "family": family, "addr": address, "port": port })
}

/// Sets livemig's half of a connection's mark.
fn set_mark(mark: Mark) -> Value {
    let key = json!({ "ct": { "key": "mark" } });
    json!({ "mangle": {
        "key": key, "value": { "|": [{ "&": [key, !Mark::MASK.bits()] }, mark.bits()] },
    } })
}
