//! What a migration tells while it runs.
//!
//! The library never prints: it emits events, and whoever called it renders them, as a progress
//! display, as JSON lines, or not at all.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::memory::Round;
use crate::criu::Finding;

/// The steps of a migration, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Both hosts are looked at; nothing is changed.
    Preflight,
    /// The tunnel comes up; image and networks are put in place at the destination.
    Prepare,
    /// Memory is copied while the container runs. The rest engine makes no rounds.
    Precopy,
    /// The container's packets begin to wait in the kernel.
    Hold,
    /// The container's processes stop, and its state is written.
    Freeze,
    /// The state goes to the destination.
    Transfer,
    /// The destination brings the container back to life.
    Restore,
    /// The flows are pointed at the destination, and what waited is let go.
    Steer,
    /// The source forgets the container.
    Commit,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Phase; 9] = [
        Phase::Preflight,
        Phase::Prepare,
        Phase::Precopy,
        Phase::Hold,
        Phase::Freeze,
        Phase::Transfer,
        Phase::Restore,
        Phase::Steer,
        Phase::Commit,
    ];

    /// The name as it stands in reports.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Preflight => "preflight",
            Phase::Prepare => "prepare",
            Phase::Precopy => "precopy",
            Phase::Hold => "hold",
            Phase::Freeze => "freeze",
            Phase::Transfer => "transfer",
            Phase::Restore => "restore",
            Phase::Steer => "steer",
            Phase::Commit => "commit",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

/// The name given is not one of a phase.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "`{0}` is not a phase; the phases are preflight, prepare, precopy, hold, freeze, transfer, restore, steer, commit"
)]
pub struct UnknownPhase(String);

impl std::str::FromStr for Phase {
    type Err = UnknownPhase;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Phase::ALL
            .into_iter()
            .find(|phase| phase.name() == name)
            .ok_or_else(|| UnknownPhase(name.to_owned()))
    }
}

/// Something that happened during a migration.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    /// A phase begins.
    Started {
        /// Which one.
        phase: Phase,
    },
    /// A phase has ended well.
    Finished {
        /// Which one.
        phase: Phase,
        /// How long it took.
        #[serde(rename = "ms", serialize_with = "super::report::milliseconds")]
        took: Duration,
    },
    /// Bytes have gone to the destination.
    Sent {
        /// What they are part of.
        what: Cargo,
        /// How many so far.
        bytes: u64,
        /// How many there will be, where that is known.
        total: Option<u64>,
    },
    /// The container is about to stand still, as a round of memory begins.
    StandsStill,
    /// It goes on.
    GoesOn,
    /// Memory was copied once while the container ran.
    Copied {
        /// How it went.
        #[serde(flatten)]
        round: Round,
    },
    /// A check found something that does not stand in the way, but should be known.
    Warning {
        /// What was found.
        finding: Finding,
    },
    /// A step failed: what was done is being undone.
    RollingBack {
        /// Why.
        cause: String,
    },
    /// One thing was undone, or could not be.
    Undone {
        /// What it was.
        effect: String,
        /// Why it could not be undone.
        failure: Option<String>,
    },
}

/// What is sent to the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cargo {
    /// The container's image.
    Image,
    /// Memory, while the container runs.
    Memory,
    /// Files that the container has changed, while it runs.
    Files,
    /// The frozen container: memory, changed files, volumes.
    Container,
}

/// Listens to a migration.
///
/// Any `FnMut(Event)` that can be sent between threads is one. It is called from the migration's own
/// task: what takes long belongs elsewhere.
pub trait Observer: Send {
    /// Something happened.
    fn observe(&mut self, event: Event);
}

impl<F: FnMut(Event) + Send> Observer for F {
    fn observe(&mut self, event: Event) {
        self(event);
    }
}
