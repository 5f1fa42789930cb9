//! What is to be held, as a value, and the rules that it becomes.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{DEFAULT_BYTES, DEFAULT_PACKETS};
use crate::conntrack::published;
use crate::conntrack::ruleset::{self, add_empty, equal, ip, payload, rule};
use crate::conntrack::{Error, Result};
use crate::tunnel::HopId;

/// A protocol with ports, in the rules of a hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortProtocol {
    /// TCP: a new connection is its SYN.
    Tcp,
    /// UDP: a new flow is one that conntrack does not know.
    Udp,
}

/// Ports of this host that are published for the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HeldPorts {
    /// TCP or UDP.
    pub protocol: PortProtocol,
    /// The host's address they are bound to; none for every one of its addresses.
    pub address: Option<IpAddr>,
    /// The first port.
    pub first: u16,
    /// The last port; the first, if it is one.
    pub last: u16,
}

/// On which side of a move packets are held, and so which ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// Where the container leaves: everything that is sent to it, and what its copy at the
    /// destination sends out of the hop.
    #[default]
    Leaving,
    /// Where it arrives: the datagrams that come out of a hop for it.
    Arriving,
    /// Where connections of it began, to which it comes home: what their peers send, and what the
    /// container itself sends, but nothing that comes out of a hop.
    Home,
}

/// What to hold. It is a value that a journal can keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldSpec {
    /// The number of the netfilter queue, which no other process of this host may use:
    /// [`Reserved::queue`](super::Reserved::queue).
    pub queue: u16,
    /// The container's addresses.
    pub addresses: Vec<IpAddr>,
    /// The ports that are published for it.
    pub ports: Vec<HeldPorts>,
    /// The peers whose connections to these ports are translated at their source too. Their packets,
    /// and those of programs of this host, wait before conntrack sees them: their entries are made
    /// over again meanwhile ([`Table::pin_all`](crate::conntrack::Table::pin_all)).
    #[serde(default)]
    pub masqueraded: Vec<IpAddr>,
    /// The hop to the destination, so that what the container sends from there waits too, until
    /// the source has let go.
    pub hop: Option<HopId>,
    /// How many packets may wait.
    pub packets: u32,
    /// How many bytes of packets may wait, headers included. The kernel needs about 1 KiB more for
    /// each.
    pub bytes: u64,
    /// On which side of the move.
    #[serde(default)]
    pub side: Side,
}

impl HoldSpec {
    /// A hold of a container's addresses where it leaves, without ports and hop and with the
    /// default bounds.
    pub fn new(queue: u16, addresses: Vec<IpAddr>) -> HoldSpec {
        HoldSpec {
            queue,
            addresses,
            ports: Vec::new(),
            masqueraded: Vec::new(),
            hop: None,
            packets: DEFAULT_PACKETS,
            bytes: DEFAULT_BYTES,
            side: Side::Leaving,
        }
    }

    /// The chain that is the switch for what is known already: with a rule in it, it queues.
    pub(super) fn queue_chain(&self) -> String {
        format!("queue{}", self.queue)
    }

    /// The switch for newcomers.
    pub(super) fn new_queue_chain(&self) -> String {
        format!("queue{}_new", self.queue)
    }

    fn established_chain(&self) -> String {
        format!("hold{}", self.queue)
    }

    fn new_chain(&self) -> String {
        format!("hold{}_new", self.queue)
    }

    /// What jumps goes before what is jumped to.
    pub(super) fn chains(&self) -> [String; 4] {
        [
            self.new_chain(),
            self.established_chain(),
            self.new_queue_chain(),
            self.queue_chain(),
        ]
    }

    pub(super) fn check(&self) -> Result<()> {
        let what = if self.addresses.is_empty() {
            "the container has no address"
        } else if self.packets == 0 || self.bytes == 0 {
            "no packet may wait"
        } else if self.ports.iter().any(|p| p.first == 0 || p.last < p.first) {
            "a range of ports is empty"
        } else {
            return Ok(());
        };
        Err(Error::BadHold { what })
    }

    /// The rules, without those that queue.
    pub(super) fn commands(&self) -> Vec<Value> {
        let (established, new) = (self.established_chain(), self.new_chain());
        let mut commands = ruleset::base();
        for chain in self.chains() {
            commands.extend(add_empty(&chain));
        }
        for (base, chain) in [(ruleset::NEW, &new), (ruleset::ESTABLISHED, &established)] {
            commands.extend(ruleset::jumps(base, chain));
        }
        match self.side {
            Side::Leaving => self.leaving(&mut commands),
            Side::Arriving => self.arriving(&mut commands),
            Side::Home => self.home(&mut commands),
        }
        commands
    }

    fn leaving(&self, commands: &mut Vec<Value>) {
        let (established, new) = (self.established_chain(), self.new_chain());
        let newcomer = goto(&self.new_queue_chain());
        let known = goto(&self.queue_chain());
        let released = json!({ "return": null });
        for (chain, verdict) in [(&new, &newcomer), (&established, &released)] {
            for mut statements in self.newcomers(PortProtocol::Tcp) {
                statements.insert(
                    0,
                    equal(
                        json!({ "&": [payload("tcp", "flags"), ["syn", "ack"]] }),
                        json!("syn"),
                    ),
                );
                statements.push(verdict.clone());
                commands.push(rule(chain, &statements));
            }
        }
        for (chain, verdict) in [(&new, &known), (&established, &released)] {
            for mut statements in self.masqueraded() {
                statements.push(verdict.clone());
                commands.push(rule(chain, &statements));
            }
        }
        for address in &self.addresses {
            if let Some(hop) = self.hop {
                let statements = [
                    equal(
                        json!({ "meta": { "key": "iifname" } }),
                        json!(hop.interface()),
                    ),
                    equal(payload(ip(address), "saddr"), address),
                    known.clone(),
                ];
                commands.push(rule(&established, &statements));
            }
            for mut statements in flows_of(address) {
                statements.push(known.clone());
                commands.push(rule(&established, &statements));
            }
        }
        for mut statements in self.newcomers(PortProtocol::Udp) {
            statements.insert(0, ruleset::begins());
            statements.push(newcomer.clone());
            commands.push(rule(&established, &statements));
        }
    }

    fn arriving(&self, commands: &mut Vec<Value>) {
        let established = self.established_chain();
        for address in &self.addresses {
            let statements = [
                ruleset::out_of_a_hop(),
                equal(payload(ip(address), "daddr"), address),
                // TCP has windows of its own; only datagrams have to be let in at a pace.
                equal(json!({ "meta": { "key": "l4proto" } }), "udp"),
                goto(&self.queue_chain()),
            ];
            commands.push(rule(&established, &statements));
        }
    }

    fn home(&self, commands: &mut Vec<Value>) {
        let established = self.established_chain();
        let known = goto(&self.queue_chain());
        for address in &self.addresses {
            let own = vec![equal(payload(ip(address), "saddr"), address)];
            for mut statements in flows_of(address).into_iter().chain([own]) {
                statements.insert(0, ruleset::not_out_of_a_hop());
                statements.push(known.clone());
                commands.push(rule(&established, &statements));
            }
        }
    }

    /// What matches packets by which connections with the container can begin: those to published
    /// ports, and those that another host carries after it ([`forward`](crate::conntrack::forward)).
    fn newcomers(&self, protocol: PortProtocol) -> Vec<Vec<Value>> {
        let mut matches = published::matches(&self.ports, protocol);
        matches.extend(self.addresses.iter().map(|address| {
            vec![
                ruleset::out_of_a_hop(),
                equal(payload(ip(address), "daddr"), address),
                equal(
                    json!({ "meta": { "key": "l4proto" } }),
                    published::name(protocol),
                ),
            ]
        }));
        matches
    }

    /// What matches packets to published ports whose connections are made over again while they are
    /// held: those of programs of this host, and of peers that are masqueraded.
    fn masqueraded(&self) -> Vec<Vec<Value>> {
        let local = equal(
            json!({ "fib": { "result": "type", "flags": ["saddr"] } }),
            "local",
        );
        let mut sources = vec![local];
        for six in [false, true] {
            let peers: Vec<&IpAddr> = self
                .masqueraded
                .iter()
                .filter(|a| a.is_ipv6() == six)
                .collect();
            if let Some(first) = peers.first() {
                sources.push(equal(payload(ip(first), "saddr"), json!({ "set": peers })));
            }
        }
        let mut matches = Vec::new();
        for protocol in [PortProtocol::Tcp, PortProtocol::Udp] {
            for statements in published::matches(&self.ports, protocol) {
                for source in &sources {
                    matches.push([&[source.clone()][..], &statements].concat());
                }
            }
        }
        matches
    }
}

/// What matches the packets towards a container in flows that conntrack knows: those that it
/// answers, and those that it opened.
fn flows_of(address: &IpAddr) -> [Vec<Value>; 2] {
    let key = format!("{} saddr", ip(address));
    [("original", "reply"), ("reply", "original")].map(|(direction, end)| {
        vec![
            equal(json!({ "ct": { "key": "direction" } }), direction),
            equal(json!({ "ct": { "key": key, "dir": end } }), address),
        ]
    })
}

fn goto(chain: &str) -> Value {
    json!({ "goto": { "target": chain } })
}
