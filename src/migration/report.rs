//! What a finished migration has to say for itself.

use std::time::Duration;

use serde::Serialize;

use super::downtime::PartTime;
use super::drain::Drain;
use super::engine::Engine;
use super::event::Phase;
use super::memory::Round;
use super::path::Path;
use crate::agent::protocol::MigrationId;
use crate::conntrack::Flow;
use crate::conntrack::hold::HoldReport;
use crate::criu::Finding;
use crate::podman::ContainerId;

/// A migration that has come to its end: the container runs at the destination.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Which migration this was.
    pub migration: MigrationId,
    /// The container; its ID is the same on both hosts.
    pub container: ContainerId,
    /// Its name.
    pub name: String,
    /// How its processes crossed.
    pub engine: Engine,
    /// The host it runs on now.
    pub destination: String,
    /// From the moment the packets of the container's connections began to wait until they were let
    /// go.
    #[serde(rename = "downtime_ms", serialize_with = "milliseconds")]
    pub downtime: Duration,
    /// What it was spent on.
    pub breakdown: Vec<PartTime>,
    /// With post-copy: for how long at most the container read nothing of what its peers had sent, after its first
    /// answer and before all of its memory was there. It waited for pages, or had other work.
    #[serde(rename = "unread_ms", serialize_with = "milliseconds_if_known")]
    pub unread: Option<Duration>,
    /// From the moment the container's processes stood still until the copy at the destination was heard.
    #[serde(rename = "frozen_ms", serialize_with = "milliseconds")]
    pub frozen: Duration,
    /// The whole migration, preflight to commit.
    #[serde(rename = "total_ms", serialize_with = "milliseconds")]
    pub total: Duration,
    /// How long each phase took. Those of the downtime overlap where they can: `transfer` runs from
    /// the first byte of the frozen container that is ready to the last that has been sent.
    pub phases: Vec<PhaseTime>,
    /// Bytes that went to the destination, image included.
    pub bytes_sent: u64,
    /// Bytes of those that were sent while the container was frozen.
    pub bytes_frozen: u64,
    /// The connections that went along.
    pub flows: Vec<Flow>,
    /// What became of those that came through this host from elsewhere.
    pub paths: Vec<Path>,
    /// How what had arrived before was read, and what was not.
    pub drain: Drain,
    /// What happened to the packets that arrived meanwhile.
    pub held: HoldReport,
    /// What CRIU says of the dump, where it said something.
    pub dump: Option<crate::criu::DumpStats>,
    /// The rounds in which memory was copied while the container ran.
    pub rounds: Vec<Round>,
    /// What was found and did not stand in the way.
    pub warnings: Vec<Finding>,
    /// What remained to be tidied at the source after the point of no return, and could not be.
    pub leftovers: Vec<Leftover>,
}

/// The time that a phase took.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct PhaseTime {
    /// Which phase.
    pub name: Phase,
    /// How long.
    #[serde(rename = "ms", serialize_with = "milliseconds")]
    pub took: Duration,
}

/// Something of a migration that could not be removed.
#[derive(Debug, Clone, Serialize)]
pub struct Leftover {
    /// What it is.
    pub effect: String,
    /// Why it is still there.
    pub failure: String,
}

impl std::fmt::Display for Leftover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.effect, self.failure)
    }
}

pub(super) fn milliseconds_if_known<S: serde::Serializer>(
    duration: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => milliseconds(duration, serializer),
        None => serializer.serialize_none(),
    }
}

pub(super) fn milliseconds<S: serde::Serializer>(
    duration: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((duration.as_secs_f64() * 1e6).round() / 1e3)
}
