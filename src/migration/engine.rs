//! The two ways in which a container's processes cross.

use serde::{Deserialize, Serialize};

use super::preflight::Preflight;
use super::request::Request;
use crate::agent::protocol::{Assessment, Offer};
use crate::criu::pages::Layout;
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

/// The engine that was asked for, or else the best that both hosts have and the container fits.
pub(super) fn choose(request: &Request, offer: &Offer, assessment: &Assessment) -> Engine {
    let able = offer.direct && assessment.direct;
    let fits = request.post_copy || offer.memory <= assessment.room;
    request.engine.unwrap_or(match able && fits {
        true => Engine::Direct,
        false => Engine::Rest,
    })
}

/// That the container's memory has no room at the destination while it is restored from it.
pub(super) fn too_large(request: &Request, preflight: &Preflight) -> Option<Finding> {
    let (memory, room) = (preflight.offer.memory, preflight.assessment.room);
    (preflight.engine == Engine::Direct && !request.post_copy && memory > room).then(|| {
        Finding::refuse(
            Code::MemoryDoesNotFit,
            format!(
                "the container has {} MiB of memory, and {} can take {} MiB at once",
                memory >> 20,
                request.to,
                room >> 20
            ),
            "make room there (mount -o remount,size=… /dev/shm), or use --post-copy, which needs none, or \
             --engine rest, which puts it on disk",
        )
    })
}

/// What stands in the way of fetching memory after the move, and what it means.
pub(super) fn post_copy(request: &Request, preflight: &Preflight) -> Option<Finding> {
    if !request.post_copy {
        return None;
    }
    let offered = preflight.offer.features.criu.as_ref();
    let here = offered
        .filter(|criu| criu.lazy_pages)
        .map(|criu| criu.version);
    let direct = preflight.engine == Engine::Direct;
    Some(
        match here.zip(preflight.assessment.fetches).filter(|_| direct) {
            None => Finding::refuse(
                Code::PostCopyUnavailable,
                "memory can only be fetched after the move with the direct engine, and where CRIU and the kernel \
             of both hosts have userfaultfd (criu check --feature uffd-noncoop) and pipes of 4 MiB \
             (CAP_SYS_RESOURCE, or sysctl fs.pipe-max-size)",
                "leave --post-copy out, or see `livemig setup --help`",
            ),
            Some((here, there)) if Layout::of(here) != Layout::of(there) => Finding::refuse(
                Code::PostCopyUnavailable,
                format!(
                    "CRIU {here} here and CRIU {there} on {} ask for memory in different ways",
                    request.to
                ),
                "leave --post-copy out, or install the same version of CRIU on both hosts",
            ),
            Some(_) => Finding::warn(
                Code::PostCopyRisk,
                format!(
                    "from the moment the container runs on {} until all of its memory is there, it needs both \
                 hosts and the network between them: if one of them fails, the container is lost",
                    request.to
                ),
                "leave --post-copy out where that is too much to ask",
            ),
        },
    )
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
