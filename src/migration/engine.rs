//! The two ways in which a container's processes cross.

use serde::{Deserialize, Serialize};

use super::preflight::Preflight;
use super::request::Request;
use crate::criu::{Code, Finding};

/// How a container's processes cross from one host to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Engine {
    /// Podman's own export and import, on hosts as they are. What Podman does with its archive is part
    /// of the downtime.
    Rest,
    /// livemig is the runtime that Podman calls ([`runtime`](crate::runtime)) on both hosts: all but the
    /// processes is at the destination before they are frozen.
    Direct,
}

impl Engine {
    /// Its name, in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Rest => "rest",
            Engine::Direct => "direct",
        }
    }
}

impl std::fmt::Display for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The engine that was asked for, or else the best that both hosts have.
pub(super) fn choose(asked: Option<Engine>, here: bool, there: bool) -> Engine {
    asked.unwrap_or(if here && there {
        Engine::Direct
    } else {
        Engine::Rest
    })
}

/// What stands in the way of the engine that was asked for.
pub(super) fn unavailable(request: &Request, preflight: &Preflight) -> Option<Finding> {
    let lacking: Vec<&str> = [
        (preflight.offer.direct, "the source"),
        (preflight.assessment.direct, request.to.as_str()),
    ]
    .into_iter()
    .filter_map(|(ready, host)| (!ready).then_some(host))
    .collect();
    (preflight.engine == Engine::Direct && !lacking.is_empty()).then(|| {
        Finding::refuse(
            Code::EngineUnavailable,
            format!(
                "the direct engine is not set up on {}, or Podman's service there was started before it was",
                lacking.join(" and ")
            ),
            "run `livemig setup` there and restart podman.service, or leave --engine out",
        )
    })
}
