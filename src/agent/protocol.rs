//! What two hosts say to each other during a migration.
//!
//! ```text
//!  source                                              destination (agent)
//!    │  POST /v1/assess            Offer ──────────────▶  looks, changes nothing
//!    │  ◀────────────────────────────────── Assessment
//!    │  POST /v1/migrations/ID     Prepare ────────────▶  hop, networks
//!    │  ◀──────────────────────────────────── Prepared
//!    │  POST /v1/migrations/ID/probe ──────────────────▶  packets of full size come through the hop
//!    │  ◀───────────────────────────────────── Nothing
//!    │  PUT  /v1/migrations/ID/image   bytes ──────────▶  only if it lacks the image
//!    │  ◀───────────────────────────────────── Nothing
//!    │  PUT  /v1/migrations/ID/volumes bytes ──────────▶  only with the direct engine: what is in
//!    │  ◀───────────────────────────────────── Nothing    them, again and again
//!    │  PUT  /v1/migrations/ID/shell   bytes ──────────▶  only with the direct engine: Podman makes
//!    │  ◀───────────────────────────────────── Nothing    the container, all but its processes
//!    │  PUT  .../files     what they changed ──────────▶  again and again
//!    │  ◀───────────────────────────────────── Nothing
//!    │  PUT  .../standby    images so far ─────────────▶  the runtime runs up to CRIU
//!    │  ◀───────────────────────────────────── Nothing
//!    │              ── hold, freeze: the downtime begins ──
//!    │  POST /v1/migrations/ID/hold    ────────────────▶  only if the container comes home: what
//!    │  ◀──────────────────────────────────────── Held    comes for it waits there, not here
//!    │  POST /v1/migrations/ID/restore                    flows inserted, container restored
//!    │       Flows, then the container as it is dumped ▶
//!    │  ◀───────────────────────────────────── Running    the one round trip of the downtime
//!    │              ── release: the downtime ends ──
//!    │  POST /v1/migrations/ID/lazy     (with post-copy: asked before the restore, and open until all is
//!    │       pages ───────────────────────────────────▶   there) what the container touches, and then
//!    │  ◀────────────────────────────── wanted addresses  all the rest
//!    │  POST /v1/migrations/ID/release ────────────────▶  what waited there goes to the container
//!    │  ◀───────────────────────────────────── Nothing
//!    │  POST /v1/migrations/ID/fetched  (with post-copy) ▶ when all of the memory is there
//!    │  ◀───────────────────────────────────── Fetched    and when it first answered
//!    │  GET  /v1/migrations/ID ────────────────────────▶
//!    │  ◀────────────────────────────────────── Status    runs still, and all of it is on the disk
//!    │  POST /v1/migrations/ID/commit  ────────────────▶  forgets how to undo
//!    │  ◀───────────────────────────────────── Nothing
//!
//!  when new connections come through a hop no more:
//!    │  DELETE /v1/forwardings/CONTAINER ──────────────▶
//!    │  ◀───────────────────────────────────── Nothing
//!  at any point before commit:
//!    │  DELETE /v1/migrations/ID ──────────────────────▶  undoes all of it, also a running container
//!    │  ◀────────────────────────────────────── Undone    only now may the source thaw
//!  when an answer was lost:
//!    │  GET /v1/migrations/ID ─────────────────────────▶
//!    │  ◀────────────────────────────────────── Status
//! ```
//!
//! The destination's side of one migration:
//!
//! ```text
//!           Prepare            restore              ok            commit
//!  unknown ─────────▶ prepared ────────▶ restoring ─────▶ running ──────▶ unknown
//!     ▲                  │                   │ failed         │
//!     └──────────────────┴───────────────────┴────────────────┘
//!                 DELETE, or (before `running`) the source stays silent
//! ```
//!
//! An agent that comes back undoes what is not `running`; what is waits for its source's word.
//!
//! The source's side. What stands below a state is the last decisive line of its journal:
//!
//! ```text
//!          Prepared            freeze            Running          let go           commit
//!  begun ───────────▶ prepared ──────▶ frozen ───────────▶ heard ───────▶ let go ──────────▶ gone
//!  Prepare │          Prepare │        Restore │           Restore │      Restore,           none
//!          │ failed           │ failed         │ refused,          │      then
//!          │ cancel           │ cancel         │ silent,           │      Committed
//!          │                  │                │ cancel            │ cancel
//!          └──────────────────┴───────┬────────┴───────────────────┘
//!                                     ▼         Undone            thaw
//!                                  undoing ─────────────▶ undone ──────▶ as before
//!                          DELETE,    │                                    none
//!                          until told │ silent for a minute
//!                                     ▼
//!                                 in doubt: frozen, no process, the journal as it was
//! ```
//!
//! Where the journal says no more than Prepare nothing is frozen: silence then keeps nobody waiting, and
//! leaves the journal to `livemig recover`.
//!
//! A process that dies leaves its host where it was, and the journal says where; `livemig recover` goes
//! on from there, as often as it takes:
//!
//! ```text
//!  Committed ─────────────────────────────────────────▶ let go: commit, the old container removed
//!  Restore ──GET──▶ running: write Committed ─────────▶ let go
//!             ├───▶ anything else ────────────────────▶ undoing
//!             └───▶ silent for a minute ──────────────▶ in doubt
//!  Prepare ───────────────────────────────────────────▶ undoing
//! ```
//!
//! Only `undone` leads to a thaw, and only Committed to the end of the old container: that is what keeps
//! the copies apart. `tests/model` checks it in all the states that the two sides and the network between
//! them can be in.

use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{Address, Fingerprint, PeerName};
use crate::conntrack::{Flow, Tuple};
use crate::criu::{Features, Finding, Version};
use crate::podman::{Container, ContainerId, HostInfo, Network};
use crate::tunnel;

/// How large the pieces are in which an image is compressed and sent, in bytes.
pub(crate) const IMAGE_PIECE: usize = 256 << 10;

/// The number of one migration, the same on both hosts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigrationId(String);

/// The text is not the number of a migration.
#[derive(Debug, Clone, thiserror::Error)]
#[error("a migration's number is 16 hexadecimal digits")]
pub struct MigrationIdError;

impl MigrationId {
    /// Digits of a number: 64 random bits, so that two migrations never meet.
    const DIGITS: usize = 16;

    /// A number that no other migration has.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub fn random() -> Result<MigrationId, getrandom::Error> {
        let number = getrandom::u64()?;
        Ok(MigrationId(format!("{number:016x}")))
    }

    /// The number as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for MigrationId {
    type Err = MigrationIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // Only these can be part of a path or of a file's name.
        let valid = text.len() == Self::DIGITS
            && text
                .bytes()
                .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if valid {
            Ok(MigrationId(text.to_owned()))
        } else {
            Err(MigrationIdError)
        }
    }
}

impl TryFrom<String> for MigrationId {
    type Error = MigrationIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MigrationId> for String {
    fn from(id: MigrationId) -> String {
        id.0
    }
}

impl std::fmt::Display for MigrationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The number of one change of a path, the same on all hosts that have a part in it: of the same kind
/// as those of migrations, and so hard to guess that knowing it shows who was told.
pub type PathId = MigrationId;

/// A container that would like to come.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Offer {
    /// What Podman says of it.
    pub container: Container,
    /// The networks it is attached to, as they are at the source.
    pub networks: Vec<Network>,
    /// The source's Podman.
    pub host: HostInfo,
    /// The source's CRIU, kernel and processor.
    pub features: Features,
    /// Whether livemig is the runtime that Podman calls there.
    #[serde(default)]
    pub direct: bool,
    /// How much memory the container's processes have, in bytes; what they share counts for each.
    #[serde(default)]
    pub memory: u64,
}

/// What the destination thinks of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Assessment {
    /// What stands in the way, and what should be known.
    pub findings: Vec<Finding>,
    /// Whether the container's exact image is there.
    pub image_present: bool,
    /// The networks that would be made.
    pub networks_to_make: Vec<String>,
    /// The destination's Podman.
    pub host: HostInfo,
    /// Whether livemig is the runtime that Podman calls there.
    #[serde(default)]
    pub direct: bool,
    /// How much memory can be taken there at once, in bytes.
    #[serde(default)]
    pub room: u64,
    /// The version of the CRIU there, if it can fetch memory after a restore.
    #[serde(default)]
    pub fetches: Option<Version>,
}

/// Get ready for it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prepare {
    /// The container, as in the assessment.
    pub offer: Offer,
    /// The source's end of the hop.
    pub hop: tunnel::Proposal,
    /// Whether memory is fetched when the container runs already.
    #[serde(default)]
    pub post_copy: bool,
    /// Whether new connections for the container will come through the hop, too.
    #[serde(default)]
    pub forward: bool,
}

/// It is ready.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Prepared {
    /// The destination's end of the hop.
    pub hop: tunnel::Proposal,
    /// Whether connections of the container began there, or came through there: it comes home.
    #[serde(default)]
    pub home: bool,
}

/// What comes for the container waits.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Held {
    /// Whether all that was let pass before went into the hop of this migration, and a packet with the
    /// migration's number follows it.
    #[serde(default)]
    pub marked: bool,
    /// For how long it has waited when this is said.
    #[serde(default)]
    pub waited: Duration,
}

/// The first frame of a restore: what has to be known before the container runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Flows {
    /// The container's connections.
    pub flows: Vec<Flow>,
}

/// The container runs at the destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Running {
    /// From the last byte received to the container running.
    pub restore: Duration,
    /// The last part of that: packets are let in to it.
    #[serde(default)]
    pub admit: Duration,
    /// How long entering its flows took, before.
    #[serde(default)]
    pub insert: Duration,
    /// How many flows were inserted.
    pub flows: usize,
    /// Which of the flows were known there and end there again, by their places in the list.
    #[serde(default)]
    pub home: Vec<usize>,
}

/// All of a container's memory has been fetched.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Fetched {
    /// How long after it ran it answered for the first time, as far as that could be seen.
    #[serde(default)]
    pub answered: Option<Duration>,
    /// For how long at most it read nothing afterwards of what peers had sent it, while memory was being fetched.
    #[serde(default)]
    pub unread: Option<Duration>,
}

/// A host, as another one knows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Introduction {
    /// What the other one calls it.
    pub name: PeerName,
    /// Its key.
    pub fingerprint: Fingerprint,
    /// Where its agent listens.
    pub address: Address,
}

/// An anchor will come for connections that it has sent through the host that says so.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Expect {
    /// The container's addresses.
    pub addresses: Vec<IpAddr>,
    /// The anchor.
    pub anchor: Introduction,
}

/// The container whose connections you send through me has moved on.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shorten {
    /// The container.
    pub container: ContainerId,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Where it is now.
    pub to: Introduction,
}

/// Connections take the direct way.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Shortened {
    /// How many.
    pub flows: usize,
}

/// Connections that came to me by way of you have gone home, and will not again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Forget {
    /// The container's addresses.
    pub addresses: Vec<IpAddr>,
    /// The connections, as the container sees them.
    pub flows: Vec<Tuple>,
}

/// A hop for a path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Open {
    /// The container, if new connections to it come this way as well.
    pub forwards: Option<ContainerId>,
    /// The anchor's end.
    pub hop: tunnel::Proposal,
}

/// Its other end.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Opened {
    /// The end at the host of the container.
    pub hop: tunnel::Proposal,
}

/// Send the answers on these connections straight to me.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Switch {
    /// The connections, as the container sees them.
    pub flows: Vec<Tuple>,
}

/// They go there.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Switched {
    /// How many of them there were.
    pub flows: usize,
}

/// Nothing but success.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Nothing {}

/// Where a migration stands at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Never heard of, undone, or committed and forgotten: nothing to undo here.
    Unknown,
    /// Hop and networks are there; the container is not.
    Prepared,
    /// The container is being restored.
    Restoring,
    /// The container runs, and can still be taken back.
    Running,
}

/// The answer to "where does it stand".
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Where it stands.
    pub stage: Stage,
    /// What was answered to the request to restore, if the container runs. That answer may be lost, or
    /// come late.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<Running>,
}

/// The destination has nothing of the migration any more.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Undone {
    /// What could not be removed there. The container is never among it: if it cannot be removed,
    /// the request fails.
    pub leftovers: Vec<String>,
}
