//! What a migration changes on a host, as values, and how each is undone.
//!
//! An effect holds all that is needed to undo it from nothing: after a crash there is only the
//! journal. Undoing is idempotent, and undoing what was never done is no error.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::agent::protocol::{MigrationId, PathId};
use crate::conntrack::forward::Forwarding;
use crate::conntrack::hold::HoldSpec;
use crate::conntrack::{Fence, Gate};
use crate::criu::Freezer;
use crate::podman::{ContainerId, ImageId, PublishedPort};
use crate::tunnel::HopId;

/// What the destination was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Asked {
    /// To make itself ready. If it hears nothing more it tidies up by itself.
    Prepare,
    /// To restore the container: from here on only its own word says that it does not run there.
    Restore,
}

/// Which end of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// The host where the connections began.
    Anchor,
    /// The host that the container is on.
    Container,
}

/// One change to a host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Effect {
    /// A share in the hop to another host; the last share gone, the hop goes.
    Hop {
        /// Whose share.
        user: String,
    },
    /// The destination was asked for something. Undone by telling it to give up what it has.
    Destination {
        /// Its name here.
        peer: String,
        /// Which migration.
        migration: MigrationId,
        /// For what.
        asked: Asked,
    },
    /// Packets wait in the kernel.
    Hold {
        /// Which ones, and how.
        spec: HoldSpec,
    },
    /// Nothing that the frozen container's kernel says leaves this host.
    Fenced {
        /// Which container.
        fence: Fence,
    },
    /// The container's processes stand still.
    Frozen {
        /// Their cgroup.
        freezer: Freezer,
    },
    /// The container's processes stand still for a moment, as a round of memory begins. Undone when nobody is
    /// at work any more who would freeze them again.
    Rounds {
        /// Which container.
        container: ContainerId,
        /// Its cgroup.
        freezer: Freezer,
    },
    /// The container's flows are pointed at a hop.
    Steered {
        /// The container's addresses.
        addresses: Vec<IpAddr>,
        /// The hop.
        hop: HopId,
    },
    /// New connections of the container go another way than before.
    Forwarding {
        /// Which container.
        container: ContainerId,
        /// What this host did for them before; nothing if they had no way.
        before: Option<Forwarding>,
    },
    /// The container is gone from here for good. Never undone: it is done only past the point of no
    /// return, and after a crash it is done again. It is written down before, so that there is no
    /// need to when the destination says that the container runs.
    Forget {
        /// Its ID.
        container: ContainerId,
        /// Whether its volumes stay.
        keep_volumes: bool,
    },
    /// A network made for the container.
    Network {
        /// Its name.
        name: String,
    },
    /// An image brought along.
    Image {
        /// Its ID.
        id: ImageId,
    },
    /// Flows of a container that is about to arrive.
    Flows {
        /// The container's addresses.
        addresses: Vec<IpAddr>,
        /// The hop they come through.
        hop: HopId,
    },
    /// Flows that began here end here again: their container comes home. Undone by sending them after
    /// it again.
    CameHome {
        /// The container's addresses.
        addresses: Vec<IpAddr>,
        /// The hop by which they went.
        hop: HopId,
    },
    /// Flows of a container take another hop.
    Path {
        /// Which end of the path this host is.
        end: End,
        /// The container's addresses.
        addresses: Vec<IpAddr>,
        /// The hop that they took before.
        from: HopId,
        /// The hop that they take now.
        to: HopId,
    },
    /// The other end of a path was asked to change it. Undone by telling it to give that up.
    PathAsked {
        /// Its name here.
        peer: String,
        /// Which change.
        path: PathId,
    },
    /// Nothing gets through to a container that is about to arrive.
    Closed {
        /// Which container.
        gate: Gate,
    },
    /// Memory of a container on its way lies in this directory.
    Staging {
        /// Which one.
        directory: PathBuf,
    },
    /// The container itself, restored here, with the volumes that came along.
    Restored {
        /// Its ID.
        container: ContainerId,
        /// Named volumes that were not here before.
        volumes: Vec<String>,
        /// The ports that it publishes.
        #[serde(default)]
        ports: Vec<PublishedPort>,
    },
}

impl Effect {
    /// Whether undoing this is up to the destination alone.
    pub(crate) fn is_owed(&self) -> bool {
        matches!(self, Effect::Destination { .. })
    }

    /// The container that this may have brought here.
    pub(crate) fn restored(&self) -> Option<&ContainerId> {
        match self {
            Effect::Restored { container, .. } => Some(container),
            _ => None,
        }
    }
}

impl std::fmt::Display for Effect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Effect::Hop { .. } => write!(f, "the tunnel, its routes and rules"),
            Effect::Destination { peer, asked, .. } => match asked {
                Asked::Prepare => write!(f, "what {peer} has prepared"),
                Asked::Restore => write!(f, "what {peer} has restored"),
            },
            Effect::Hold { .. } => write!(f, "packets waiting in the kernel"),
            Effect::Fenced { .. } => write!(f, "the rule that keeps the frozen container quiet"),
            Effect::Frozen { .. } => write!(f, "frozen processes"),
            Effect::Rounds { .. } => write!(f, "processes frozen for a round of memory"),
            Effect::Steered { hop, .. } => write!(f, "flows steered into {}", hop.interface()),
            Effect::Forwarding { .. } => write!(f, "the way of new connections"),
            Effect::Forget { container, .. } => write!(f, "the old container {container}"),
            Effect::Network { name } => write!(f, "network {name}"),
            Effect::Image { id } => write!(f, "image {id}"),
            Effect::Closed { .. } => write!(f, "the rule that keeps packets from the container"),
            Effect::Flows { .. } => write!(f, "flows inserted for the container"),
            Effect::Path { to, .. } => write!(f, "flows that take hop {to}"),
            Effect::PathAsked { peer, .. } => write!(f, "the other end of a path, at {peer}"),
            Effect::CameHome { .. } => write!(f, "flows that end at this host again"),
            Effect::Staging { directory } => {
                write!(f, "the container's memory in {}", directory.display())
            }
            Effect::Restored {
                container, volumes, ..
            } if volumes.is_empty() => {
                write!(f, "container {container}")
            }
            Effect::Restored {
                container, volumes, ..
            } => {
                write!(
                    f,
                    "container {container} and volumes {}",
                    volumes.join(", ")
                )
            }
        }
    }
}
