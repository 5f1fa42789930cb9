//! Podman on one host, through the API on its unix socket.
//!
//! Everything that livemig wants of Podman goes through [`Client`]: what a container is made of
//! ([`Client::inspect`]), its checkpoint as a stream of bytes ([`Client::checkpoint`]) that another
//! host's Podman takes as it comes ([`Client::restore`]), and what has to be at the destination
//! beforehand: image, volumes, networks.
//!
//! The crate podman-api does what it does well: the host, lists, events, image export, volumes,
//! networks, removal. It cannot post an archive for a restore, copies a whole image into memory to
//! load it, leaves out fields that a migration depends on, and does not understand the inspection
//! of a container from Podman 5; those calls are made with hyper on the same socket, into types of
//! our own that ignore what they do not know.
//!
//! What Podman was seen to do (5.8.6 with runc 1.3.6 and crun 1.28, CRIU 4.2.1):
//! - Paths without a version (`/libpod/...`) are answered with 404; any version from 3 to 6 is
//!   taken, and `v4.9.0` means the same to Podman 4.9 as to 5.8.
//! - Every refusal but "no such thing" has status 500, so what it means is read from its words
//!   ([`Refusal`]).
//! - A container whose cgroup was frozen beforehand can be checkpointed with `leave_running`, is
//!   still frozen afterwards, and can be removed by force while it is.
//!
//! ```no_run
//! # async fn example() -> Result<(), livemig::podman::Error> {
//! use livemig::podman::{CheckpointOptions, Client, RestoreOptions};
//!
//! let here = Client::new("/run/podman/podman.sock".as_ref());
//! let container = here.inspect("web").await?;
//! let archive = here
//!     .checkpoint(&container.id, &CheckpointOptions { tcp_established: true, ..Default::default() })
//!     .await?;
//! let there = Client::new("/run/other/podman.sock".as_ref());
//! let restored = there
//!     .restore(archive, &RestoreOptions { tcp_established: true, ..Default::default() })
//!     .await?;
//! println!("{} runs", restored.id);
//! # Ok(())
//! # }
//! ```

mod checkpoint;
mod client;
mod error;
mod events;
mod failure_log;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod id;
mod image;
mod inspect;
mod network;
pub(crate) mod remains;
mod request;
mod restore;
mod secret;
mod volume;

pub use checkpoint::CheckpointOptions;
pub use client::{
    Allocation, Client, ContainerSummary, HostInfo, RemoveOptions, RuntimeInfo, Timeouts,
};
pub use error::{Error, Refusal, Result};
pub use events::{Event, EventStream};
pub use failure_log::{FailureLog, failure_log};
pub use id::{ContainerId, ImageId};
pub use image::Image;
pub use inspect::{
    Attachment, Container, Device, IdMapping, Mode, Mount, PublishedPort, RestartPolicy, RootFs,
    Status,
};
pub use network::{LeaseRange, Network, Route, Subnet};
pub use request::Chunks;
pub use restore::{CriuStatistics, RestoreOptions, Restored};
pub use volume::Volume;
