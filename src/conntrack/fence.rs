//! Keeping a frozen container quiet.
//!
//! Freezing stops its processes, not its sockets: the kernel goes on acknowledging and retransmitting
//! for them. While another copy may run, nothing of that may leave:
//!
//! - A retransmission carries a timestamp of *now*. The copy's clock goes on from the time of the
//!   dump, so a peer that has seen the later timestamp discards what the copy sends as old (PAWS,
//!   RFC 7323, section 5) until its clock has caught up: as long again as the move took.
//! - When the frozen container is removed in the end, its sockets say goodbye to peers that are
//!   talking to the copy.
//!
//! So what comes from its addresses is dropped, before connection tracking sees it: a reset would
//! end the flow there too. What comes out of a hop is not meant; that is the copy.
//!
//! Nor does the frozen container hear anybody who comes to it now: Podman still leads its ports to
//! it. Once its flows have left, a new connection to these ports is refused, as it is when the
//! container is gone: with a reset, or with an ICMP message (port unreachable).

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::hold::{HeldPorts, PortProtocol};
use super::ruleset::{
    self, Rules, add_empty, begins, equal, ip, not_out_of_a_hop, not_steered, payload, rule,
};
use super::{Result, published};
use crate::podman::ContainerId;

const INSTALL: &str = "keep the frozen container quiet";

/// A container that is kept quiet. It is a value that a journal can keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fence {
    /// The container.
    pub container: ContainerId,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The ports that are published for it.
    #[serde(default)]
    pub ports: Vec<HeldPorts>,
}

impl Fence {
    fn chain(&self) -> String {
        format!("fence_{}", self.container.short())
    }

    fn drop_chain(&self) -> String {
        format!("{}_drop", self.chain())
    }

    fn arrivals_chain(&self) -> String {
        format!("{}_arrivals", self.chain())
    }

    fn refuse_chain(&self) -> String {
        format!("{}_refuse", self.chain())
    }

    /// Makes the rules, which nothing leads to yet: starting `nft` takes time that a frozen
    /// container does not have.
    ///
    /// # Errors
    /// When `nft` cannot be run, or refuses.
    pub async fn prepare(&self) -> Result<()> {
        let (chain, drop_chain) = (self.chain(), self.drop_chain());
        let mut commands = ruleset::base();
        commands.extend(add_empty(&chain));
        commands.extend(add_empty(&drop_chain));
        let jump = json!({ "jump": { "target": chain } });
        commands.push(ruleset::named_rule(ruleset::NEW[0], &chain, &[jump]));
        commands.extend(self.refusal());
        for address in &self.addresses {
            let statements = [
                not_out_of_a_hop(),
                equal(payload(ip(address), "saddr"), address),
                json!({ "drop": null }),
            ];
            commands.push(rule(&drop_chain, &statements));
        }
        ruleset::apply(INSTALL, commands).await
    }

    /// Keeps the container quiet from here on, by the rules that [`Fence::prepare`] has made.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or refuses.
    pub fn install(&self) -> Result<()> {
        Rules::open()?.add_jump(INSTALL, &self.chain(), &self.drop_chain())
    }

    /// The rules that refuse new connections.
    fn refusal(&self) -> Vec<Value> {
        let (arrivals, refuse) = (self.arrivals_chain(), self.refuse_chain());
        let mut commands = Vec::new();
        commands.extend(add_empty(&arrivals));
        commands.extend(add_empty(&refuse));
        commands.extend(ruleset::jumps(ruleset::ARRIVALS, &arrivals));
        for (protocol, reject) in [
            (PortProtocol::Tcp, json!({ "type": "tcp reset" })),
            (
                PortProtocol::Udp,
                json!({ "type": "icmpx", "expr": "port-unreachable" }),
            ),
        ] {
            for mut statements in published::matches(&self.ports, protocol) {
                statements.insert(0, begins());
                // Of a flow that has left and was never answered every packet is new to conntrack.
                statements.insert(1, not_steered());
                statements.push(json!({ "reject": reject }));
                commands.push(rule(&refuse, &statements));
            }
        }
        commands
    }

    /// Refuses new connections from here on, by the rules that [`Fence::prepare`] has made.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or refuses.
    pub fn refuse(&self) -> Result<()> {
        Rules::open()?.add_jump(
            "refuse new connections",
            &self.arrivals_chain(),
            &self.refuse_chain(),
        )
    }

    /// Lets it speak again. It is no error if nothing keeps it from that.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or refuses.
    pub async fn remove(&self) -> Result<()> {
        const DOING: &str = "let the container speak again";
        // What jumps goes before what is jumped to.
        let chains = [
            self.chain(),
            self.drop_chain(),
            self.arrivals_chain(),
            self.refuse_chain(),
        ];
        ruleset::blocking(DOING, move |rules| {
            rules.remove(DOING, &chains, Vec::new)?;
            rules.remove_unused()
        })
        .await
    }
}
