//! A container's connections, as the kernel of this host has them: read, marked, forgotten.

use std::net::IpAddr;

use crate::Result;
use crate::conntrack::{self, Flow, Mark, Table, Tuple};
use crate::netlink::Namespace;
use crate::podman::Container;

/// The connections of a container with these addresses that this host knows.
pub(crate) async fn of(addresses: &[IpAddr]) -> Result<Vec<Flow>> {
    let table = table()?;
    let mut flows = Vec::new();
    for address in addresses {
        let entries = table.dump_container(*address).await?;
        flows.extend(entries.iter().filter_map(|entry| entry.flow_of(*address)));
    }
    Ok(flows)
}

/// Those of a container of this host that are not over.
pub(super) async fn live(container: &Container) -> Result<Vec<Flow>> {
    let addresses: Vec<_> = container.addresses().collect();
    let mut flows = of(&addresses).await?;
    flows.retain(|flow| !flow.entry.is_over());
    Ok(flows)
}

/// Changes marks.
pub(crate) async fn mark_all(marks: Vec<(Tuple, Mark, Mark)>) -> Result<()> {
    all_unless_gone(table()?.set_mark_all(marks).await?)
}

/// Forgets connections.
pub(crate) async fn forget(flows: &[Flow]) -> Result<()> {
    let tuples = flows.iter().map(|flow| flow.entry.original).collect();
    all_unless_gone(table()?.delete_all(tuples).await?)
}

/// What became of many connections: one may have ended at any moment.
pub(super) fn all_unless_gone(outcomes: Vec<conntrack::Result<()>>) -> Result<()> {
    for outcome in outcomes {
        match outcome {
            Err(error) if error.is_gone() => {}
            other => other?,
        }
    }
    Ok(())
}

fn table() -> Result<Table> {
    Ok(Table::open(&Namespace::current()?)?)
}
