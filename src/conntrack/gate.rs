//! Keeping packets from a container that is about to arrive.
//!
//! While it is being restored its network namespace has its addresses already and its sockets not
//! yet: the kernel would answer whatever comes for them with a reset, and that would end the
//! connection. As a rule nothing comes, because the source holds it; but if the source's process
//! dies, the kernel lets go of it. What is dropped here TCP sends again.
//!
//! Only what comes out of a hop is meant, and it is dropped before connection tracking sees it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Result;
use super::ruleset::{self, add_empty, equal, ip, out_of_a_hop, payload, rule};
use crate::podman::ContainerId;

const OPENING: &str = "let packets through to the container";

/// A container that nothing gets through to. It is a value that a journal can keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gate {
    /// The container.
    pub container: ContainerId,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
}

impl Gate {
    fn chain(&self) -> String {
        format!("gate_{}", self.container.short())
    }

    /// Lets nothing through from here on.
    ///
    /// # Errors
    /// When `nft` cannot be run, or refuses.
    pub async fn close(&self) -> Result<()> {
        let chain = self.chain();
        let mut commands = ruleset::base();
        commands.extend(add_empty(&chain));
        let jump = json!({ "jump": { "target": chain } });
        commands.push(ruleset::named_rule(ruleset::NEW[0], &chain, &[jump]));
        for address in &self.addresses {
            let statements = [
                out_of_a_hop(),
                equal(payload(ip(address), "daddr"), address),
                json!({ "drop": null }),
            ];
            commands.push(rule(&chain, &statements));
        }
        ruleset::apply(
            "keep packets from a container that is not there yet",
            commands,
        )
        .await
    }

    /// Lets everything through again. It is no error if nothing is in the way. What this leaves behind
    /// [`Gate::remove`] removes, for which packets have to be waited for: not while the container waits.
    ///
    /// # Errors
    /// When the kernel cannot be asked, or refuses.
    pub async fn open(&self) -> Result<()> {
        let chain = self.chain();
        ruleset::blocking(OPENING, move |rules| {
            rules.remove(OPENING, &[chain], Vec::new)
        })
        .await
    }

    /// Opens the gate, and leaves nothing of it behind.
    ///
    /// # Errors
    /// As [`Gate::open`].
    pub async fn remove(&self) -> Result<()> {
        self.open().await?;
        ruleset::blocking(OPENING, |rules| rules.remove_unused()).await
    }
}
