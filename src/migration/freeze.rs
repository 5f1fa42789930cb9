//! The container's processes stop, and its state is written.
//!
//! The cgroup is frozen first, by us, and the checkpoint is asked to leave the container running:
//! CRIU then finds it frozen, takes its state without polling, and leaves it frozen. Meanwhile, since
//! nothing of the container moves any more, its flows are read and marked, its changed files are
//! collected, and what its kernel still has to say is kept from the world.

use std::path::PathBuf;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;

use super::undo::blocking;
use super::{Migration, Part, memory, steer};
use crate::bundle::{self, Changes, DeltaFile, Layers, Pace};
use crate::conntrack::Fence;
use crate::conntrack::forward::Forwarding;
use crate::podman::{CheckpointOptions, Chunks, Client, Container};
use crate::{Config, Error, Result};

/// A frozen container's state, by the engine that has it.
pub(super) enum Frozen {
    Rest {
        /// Podman's archive: memory, configuration, volumes.
        checkpoint: Chunks,
        /// The files that it changed.
        changed: DeltaFile,
    },
    Direct {
        /// CRIU's images, but for the memory.
        images: BoxStream<'static, bundle::Result<Bytes>>,
        /// What has changed in its files since the last round.
        changes: Changes,
    },
}

pub(super) async fn freeze(migration: &mut Migration<'_>) -> Result<()> {
    let freezer = migration
        .freezer
        .clone()
        .ok_or(Error::OutOfOrder("freezer"))?;
    let within = migration.request.config.freeze_timeout;
    freezer.freeze(within).await?;
    migration.downtime.part(Part::Freeze);

    let hop = migration.hop()?;
    let container = &migration.preflight.container;
    let fence = migration.fence.clone();
    let forwarding = migration.forwarding.clone();
    let mark = async {
        // Before its kernel sends anything once more, for which it takes 40 ms and longer.
        let fenced = blocking(move || {
            fence.as_ref().map_or(Ok(()), Fence::install)?;
            // These come to effect with the first packet that is let go.
            fence.as_ref().map_or(Ok(()), Fence::refuse)?;
            forwarding.as_ref().map_or(Ok(()), Forwarding::switch)
        });
        let marked = steer::mark(container, &migration.preflight.offer.networks, hop);
        let (fenced, marked) = futures::join!(fenced, marked);
        fenced?;
        marked
    };
    // All run to their ends, also when one fails: a mark that is about to be set must not come
    // after it was undone.
    let (frozen, flows) = match &mut migration.shell {
        None => {
            let staging = staging(&migration.request.config)?;
            let changed =
                async { Ok::<_, Error>(DeltaFile::make(layers(container)?, staging).await?) };
            let checkpoint = checkpoint(&migration.hands.podman, container);
            let (checkpoint, changed, flows) = futures::join!(checkpoint, changed, mark);
            // If Podman has died, its runtime goes on.
            migration.hands.unsure |=
                matches!(&checkpoint, Err(error) if error.is_podmans_silence());
            let frozen = checkpoint.and_then(|checkpoint| {
                let changed = changed?;
                Ok(Frozen::Rest {
                    checkpoint,
                    changed,
                })
            });
            (frozen, flows)
        }
        Some(shell) => {
            let staging = staging(&migration.request.config)?;
            let mirror = migration.mirror.take().ok_or(Error::OutOfOrder("mirror"))?;
            let changes = mirror.file(Pace::Frozen, staging);
            let terms = memory::Terms::of(
                &migration.preflight,
                migration.request,
                &migration.id,
                migration.rounds.len(),
            )?;
            let dump = async {
                match migration.request.post_copy {
                    true => memory::leave(shell, &terms).await.map(|()| 0),
                    false => memory::send(shell, &terms).await,
                }
            };
            let (dumped, changes, flows) = futures::join!(dump, changes, mark);
            let frozen = dumped.and_then(|bytes| {
                migration.bytes_frozen += bytes;
                let (changes, _) = changes?;
                let images = bundle::images(&shell.images, &mut shell.sent)?.boxed();
                Ok(Frozen::Direct { images, changes })
            });
            (frozen, flows)
        }
    };
    migration.flows = flows?;
    migration.frozen = Some(frozen?);
    migration.downtime.part(Part::Dump);
    Ok(())
}

/// Has Podman write the container's state. It stays frozen, and complete.
pub(super) async fn checkpoint(podman: &Client, container: &Container) -> Result<Chunks> {
    let options = CheckpointOptions {
        leave_running: true,
        tcp_established: true,
        // livemig brings the changed files itself: Podman's own export loses some of them.
        ignore_rootfs: true,
        // A database holds some, and CRIU balks at them unless it is told.
        file_locks: true,
        ..CheckpointOptions::default()
    };
    podman
        .checkpoint(&container.id, &options)
        .await
        .map_err(|error| memory::of_criu(error.into(), &container.static_dir))
}

/// A directory in memory for the files on their way.
pub(super) fn staging(config: &Config) -> Result<PathBuf> {
    let staging = config.staging_dir();
    std::fs::create_dir_all(&staging).map_err(Error::file("make", &staging))?;
    Ok(staging)
}

/// Where the container's files are.
pub(super) fn layers(container: &Container) -> Result<Layers> {
    let rootfs = &container.rootfs;
    Ok(Layers {
        upper: rootfs.upper.clone().ok_or(Error::OutOfOrder("overlay"))?,
        merged: rootfs.merged.clone().ok_or(Error::OutOfOrder("overlay"))?,
        lower: rootfs.lower.clone(),
    })
}
