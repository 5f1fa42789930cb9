//! The container's processes stop, and its state is written.
//!
//! The cgroup is frozen first, by us, and the checkpoint is asked to leave the container running:
//! CRIU then finds it frozen, takes its state without polling, and leaves it frozen. Meanwhile, since
//! nothing of the container moves any more, its flows are read and marked, its changed files are
//! collected, and what its kernel still has to say is kept from the world.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::StreamExt;
use hyper::{HeaderMap, Method};
use tokio_util::sync::CancellationToken;

use super::shell::Shell;
use super::{Migration, steer};
use crate::agent::protocol::{MigrationId, Nothing};
use crate::bundle::{self, Changes, Compression, DeltaFile, Layers, Pace};
use crate::criu::pages::Layout;
use crate::criu::pages::relay::Relay;
use crate::podman::{CheckpointOptions, Chunks, Client, Container, FailureLog, failure_log};
use crate::runtime::Invocation;
use crate::runtime::dump::{self, CriuOptions};
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
        /// Where CRIU's images are.
        images: PathBuf,
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
    if let Some(fence) = &migration.fence {
        fence.install()?;
    }

    let hop = migration.hop()?;
    let container = &migration.preflight.container;
    let mark = steer::mark(container, &migration.preflight.offer.networks, hop);
    // All run to their ends, also when one fails: a mark that is about to be set must not come
    // after it was undone.
    let (frozen, flows) = match &mut migration.shell {
        None => {
            let staging = staging(&migration.request.config)?;
            let changed =
                async { Ok::<_, Error>(DeltaFile::make(layers(container)?, staging).await?) };
            let checkpoint = checkpoint(&migration.hands.podman, container);
            let (checkpoint, changed, flows) = futures::join!(checkpoint, changed, mark);
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
            let criu = &migration.preflight.offer.features.criu;
            let criu = criu.as_ref().ok_or(Error::OutOfOrder("CRIU"))?;
            let layout = Layout::of(criu.version);
            let within = migration.request.config.shell_timeout;
            let dump = dump(shell, &migration.id, &migration.request.to, layout, within);
            let (dumped, changes, flows) = futures::join!(dump, changes, mark);
            let frozen = dumped.and_then(|bytes| {
                migration.bytes_frozen += bytes;
                let (changes, _) = changes?;
                let images = shell.images.clone();
                Ok(Frozen::Direct { images, changes })
            });
            (frozen, flows)
        }
    };
    migration.flows = flows?;
    migration.frozen = Some(frozen?);
    Ok(())
}

/// Has the runtime take the container's state, as Podman would have it: its memory goes straight to the
/// destination, the rest into a directory. It stays frozen, and complete. Returns how many bytes have gone.
async fn dump(
    shell: &mut Shell,
    migration: &MigrationId,
    destination: &str,
    layout: Layout,
    within: Duration,
) -> Result<u64> {
    let relay = Relay::listen(layout).await?;
    let options = relay
        .options()
        .into_iter()
        .fold(CriuOptions::packets_are_held(), CriuOptions::with);
    let failed = CancellationToken::new();
    // Where there was no dump nobody ends the stream, and the destination takes it for cut off.
    let pages = relay
        .pages(false)
        .take_until(failed.clone().cancelled_owned());
    let (bytes, progress) = bundle::send(pages, Compression::None);
    let path = format!("/v1/migrations/{migration}/pages");
    let send = shell
        .for_pages
        .send_stream(Method::PUT, &path, HeaderMap::new(), bytes, within);
    let dump = async {
        let ended = run(
            &shell.checkpoint,
            &shell.runtime,
            &shell.images,
            &shell.work,
            &options,
        );
        ended.await.inspect_err(|_| failed.cancel())
    };
    // Whichever fails first makes the other fail as well, and is the reason.
    let send = async { (send.await, failed.is_cancelled()) };
    let (dumped, (sent, failed_before)) = futures::join!(dump, send);
    match sent {
        Err(error) if !failed_before => Err(Error::of_host(destination)(error)),
        sent => {
            dumped?;
            let Nothing {} = sent?;
            Ok(progress.wire())
        }
    }
}

/// Runs the runtime's checkpoint.
async fn run(
    checkpoint: &Invocation,
    runtime: &Path,
    images: &Path,
    work: &Path,
    options: &CriuOptions,
) -> Result<()> {
    let call = checkpoint.clone();
    let call = call.with_image_path(images).with_work_path(work);
    let environment = options.write(&work.join("criu.conf"))?;
    let dumped = dump::run(runtime, &call, environment).await;
    dumped.map_err(|source| {
        let source = Error::from(source);
        match failure_log(work, FailureLog::Dump) {
            Some(reason) => Error::Dump {
                source: Box::new(source),
                reason,
            },
            None => source,
        }
    })
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
        .map_err(
            |source| match failure_log(&container.static_dir, FailureLog::Dump) {
                Some(reason) => Error::Dump {
                    source: Box::new(source.into()),
                    reason,
                },
                None => source.into(),
            },
        )
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
