//! A dry run: every change that a migration would make, on which host, and how it would be undone.

use serde::Serialize;

use super::engine::Engine;
use super::event::Phase;
use super::preflight::{self, Preflight};
use super::request::Request;
use crate::Result;
use crate::podman::Mount;

/// What a migration would do.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// What was seen of both hosts.
    pub preflight: Preflight,
    /// Every change, in order.
    pub steps: Vec<Step>,
}

/// One change.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// When.
    pub phase: Phase,
    /// Where.
    pub host: String,
    /// What.
    pub change: String,
    /// How it is undone if a later step fails; nothing past the point of no return.
    pub undo: Option<String>,
}

/// Looks at both hosts and says what a migration would do. Changes nothing.
///
/// # Errors
/// As [`check`](fn@super::check).
pub async fn plan(request: &Request) -> Result<Plan> {
    let preflight = preflight::check(request).await?;
    let steps = steps(&preflight, request);
    Ok(Plan { preflight, steps })
}

fn steps(preflight: &Preflight, request: &Request) -> Vec<Step> {
    let container = &preflight.container;
    let mut steps = Vec::new();
    let mut add = |phase, host: &str, change: String, undo: Option<&str>| {
        steps.push(Step {
            phase,
            host: host.to_owned(),
            change,
            undo: undo.map(str::to_owned),
        });
    };
    let here = "this host";
    let there = request.to.as_str();
    let flows = match preflight.flows.len() {
        1 => "1 flow is".to_owned(),
        many => format!("{many} flows are"),
    };

    for host in [here, there] {
        let undo = Some("remove them, unless another migration uses the tunnel");
        add(
            Phase::Prepare,
            host,
            format!(
                "tunnel to {}, its routing table and rules",
                if host == here { there } else { here }
            ),
            undo,
        );
    }
    for network in &preflight.assessment.networks_to_make {
        add(
            Phase::Prepare,
            there,
            format!("network {network}, as it is here"),
            Some("remove it"),
        );
    }
    if !preflight.assessment.image_present {
        add(
            Phase::Prepare,
            there,
            format!("image {}, sent from here", container.image_name),
            Some("remove it"),
        );
    }
    if preflight.engine == Engine::Direct {
        add(
            Phase::Prepare,
            here,
            format!(
                "`{}` is exported by Podman but for its processes; it runs on",
                container.name
            ),
            Some("drop it"),
        );
        add(
            Phase::Precopy,
            there,
            format!(
                "Podman makes `{}`, all but its processes, with its files; its memory goes ahead as far as it can",
                container.name
            ),
            Some("remove it"),
        );
    }
    add(
        Phase::Hold,
        here,
        format!(
            "packets for `{}` wait, at most {} and {} MiB of them",
            container.name,
            request.config.hold_packets,
            request.config.hold_bytes >> 20
        ),
        Some("let them go"),
    );
    add(
        Phase::Freeze,
        here,
        "its processes are frozen, its state is dumped".to_owned(),
        Some("thaw them"),
    );
    add(
        Phase::Freeze,
        here,
        format!("{flows} marked for the tunnel"),
        Some("clear the marks"),
    );
    add(
        Phase::Restore,
        there,
        format!("{flows} entered into connection tracking"),
        Some("delete them"),
    );
    let volumes: Vec<&str> = container
        .mounts
        .iter()
        .filter_map(|mount| match mount {
            Mount::Volume { name, .. } => Some(name.as_str()),
            _ => None,
        })
        .collect();
    let with = if volumes.is_empty() {
        String::new()
    } else {
        format!(", with volumes {}", volumes.join(", "))
    };
    add(
        Phase::Restore,
        there,
        format!("`{}` is restored{with}", container.name),
        Some("remove it"),
    );
    add(
        Phase::Steer,
        here,
        "the waiting packets go to the destination".to_owned(),
        Some("let them go to the container here"),
    );
    add(
        Phase::Commit,
        here,
        format!("`{}` is removed", container.name),
        None,
    );
    if !volumes.is_empty() && !request.keep_volumes {
        add(
            Phase::Commit,
            here,
            format!(
                "volumes {} are removed, unless another container uses them",
                volumes.join(", ")
            ),
            None,
        );
    }
    if request.forward_new {
        for (host, change) in [
            (
                here,
                "new connections to its published ports go into the tunnel",
            ),
            (there, "they may come out of it"),
        ] {
            let undo = Some("remove the rules");
            add(Phase::Commit, host, change.to_owned(), undo);
        }
    }
    let from_elsewhere = preflight
        .flows
        .iter()
        .filter(|flow| flow.came_by().is_some())
        .count();
    if from_elsewhere > 0 && !request.keep_chain {
        add(
            Phase::Commit,
            "the hosts where they began",
            format!("{from_elsewhere} flows that came through this host take the direct way"),
            None,
        );
    }
    steps
}
