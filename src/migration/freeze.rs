//! The container's processes stop, and its state is written.
//!
//! The cgroup is frozen first, by us, and the checkpoint is asked to leave the container running:
//! CRIU then finds it frozen, takes its state without polling, and leaves it frozen. Meanwhile, since
//! nothing of the container moves any more, its flows are read and marked, its changed files are
//! collected, and what its kernel still has to say is kept from the world.

use super::{Migration, steer};
use crate::bundle::{DeltaFile, Layers};
use crate::podman::{CheckpointOptions, Chunks, Client, Container, FailureLog, failure_log};
use crate::{Error, Result};

/// A frozen container.
pub(super) struct Frozen {
    /// Podman's archive: memory, configuration, volumes.
    pub checkpoint: Chunks,
    /// The files that it changed.
    pub changed: DeltaFile,
}

pub(super) async fn freeze(migration: &mut Migration<'_>) -> Result<()> {
    let freezer = migration
        .freezer
        .clone()
        .ok_or(Error::OutOfOrder("freezer"))?;
    let within = migration.request.config.freeze_timeout;
    freezer.freeze(within).await?;

    let hop = migration.hop()?;
    let container = &migration.preflight.container;
    let staging = migration.request.config.staging_dir();
    std::fs::create_dir_all(&staging).map_err(Error::file("make", &staging))?;
    let changed = async { Ok::<_, Error>(DeltaFile::make(layers(container)?, staging).await?) };
    let fence = migration.fence.clone();
    let fenced = async {
        match fence {
            Some(fence) => Ok::<_, Error>(fence.install().await?),
            None => Ok(()),
        }
    };
    // All run to their ends, also when one fails: a rule that `nft` is about to make must not come
    // after it was undone.
    let (checkpoint, changed, flows, fenced) = futures::join!(
        checkpoint(&migration.hands.podman, container),
        changed,
        steer::mark(container, &migration.preflight.offer.networks, hop),
        fenced,
    );
    fenced?;
    migration.flows = flows?;
    migration.frozen = Some(Frozen {
        checkpoint: checkpoint?,
        changed: changed?,
    });
    Ok(())
}

/// Has Podman write the container's state. It stays frozen, and complete.
async fn checkpoint(podman: &Client, container: &Container) -> Result<Chunks> {
    let options = CheckpointOptions {
        leave_running: true,
        tcp_established: true,
        // livemig brings the changed files itself: Podman's own export loses some of them.
        ignore_rootfs: true,
        ..CheckpointOptions::default()
    };
    podman
        .checkpoint(&container.id, &options)
        .await
        .map_err(
            |source| match failure_log(&container.static_dir, FailureLog::Dump) {
                Some(reason) => Error::Dump { source, reason },
                None => source.into(),
            },
        )
}

/// Where the container's files are.
fn layers(container: &Container) -> Result<Layers> {
    let rootfs = &container.rootfs;
    Ok(Layers {
        upper: rootfs.upper.clone().ok_or(Error::OutOfOrder("overlay"))?,
        merged: rootfs.merged.clone().ok_or(Error::OutOfOrder("overlay"))?,
        lower: rootfs.lower.clone(),
    })
}
