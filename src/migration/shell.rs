//! The container without its processes, made at the destination while they run here.
//!
//! Podman is asked for a checkpoint, and its runtime, which is livemig, says at once that it is done
//! ([`runtime`]). What Podman exports then is the **shell**: configuration and
//! networks. The destination makes a container of it, down to the last step, and waits there. Files
//! follow in rounds ([`precopy`](super::precopy)), the last of them with the memory.

use std::collections::BTreeSet;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use hyper::{HeaderMap, Method};

use super::memory::{self, Serving};
use super::preflight::connect;
use super::{Effect, Migration, freeze};
use crate::agent::Connection;
use crate::agent::protocol::Nothing;
use crate::bundle::{self, Progress};
use crate::criu::Freezer;
use crate::runtime::{
    Checkpoint, CriuOption, Invocation, OnStandby, Rendezvous, Standby, Verb, setup,
};
use crate::{Error, Result, runtime};

/// The checkpoint that Podman believes to have made.
pub(super) struct Shell {
    /// How Podman has a checkpoint of this container made.
    pub checkpoint: Invocation,
    /// By which program.
    pub runtime: PathBuf,
    /// What a round of memory freezes, where it is livemig that does it.
    pub freezer: Option<Freezer>,
    /// Where all of it lies, in memory.
    staging: PathBuf,
    /// Where its images will be.
    pub images: PathBuf,
    /// Where CRIU's log and statistics will be.
    pub work: PathBuf,
    /// What Podman has written of the container.
    archive: Option<BoxStream<'static, bundle::Result<Bytes>>>,
    /// When the destination had made the container, and Podman there began to wait for its processes.
    pub made: Option<Instant>,
    /// Which of the images have gone ahead.
    pub sent: BTreeSet<PathBuf>,
    /// A connection to the destination for nothing but memory, so that opening one costs no downtime.
    pub for_pages: Connection,
    /// The runtime, with a CRIU that waits for the word.
    pub standby: Option<(Checkpoint, OnStandby)>,
    /// With post-copy: the runtime, while it serves the memory.
    pub serving: Option<Serving>,
}

impl Shell {
    /// Makes the directories of a round in which memory is copied.
    pub fn round(&self, number: usize) -> Result<(PathBuf, PathBuf)> {
        let (images, work) = memory::directories(&self.staging, number);
        make(&images)?;
        make(&work)?;
        Ok((images, work))
    }

    /// Where the last of so many rounds is.
    pub fn last_round(&self, rounds: usize) -> Option<PathBuf> {
        (rounds > 0).then(|| memory::directories(&self.staging, rounds).0)
    }
}

/// Has Podman write the archive of the container, all but its processes, and learns how it has them saved.
pub(super) async fn take(migration: &mut Migration<'_>) -> Result<()> {
    let config = &migration.request.config;
    let container = &migration.preflight.container;
    let directory = config.memory_dir.join(format!("livemig-{}", migration.id));
    migration.journal.will([Effect::Staging {
        directory: directory.clone(),
    }])?;
    let (images, work) = staging(&directory)?;

    let for_pages = connect(config, &migration.peer).await?;
    let within = config.shell_timeout;
    let rendezvous = Rendezvous::open(&setup::waiting(config), Verb::Checkpoint, &container.id)?;
    let not_called = runtime::Error::NotCalled {
        verb: Verb::Checkpoint,
        within,
    };
    let call = async {
        let arrived = rendezvous.arrival(within).await?;
        let checkpoint = arrived.invocation().clone();
        if checkpoint.option("--leave-running").is_none() {
            // Somebody's own, that came in between. It would be believed to have been made.
            arrived.refuse("this container is being migrated").await?;
            return Err(Error::Busy {
                container: container.name.clone(),
                holder: "somebody who checkpoints it".to_owned(),
            });
        }
        let runtime = arrived.program().to_owned();
        arrived.pretend().await?;
        Ok(Shell {
            checkpoint,
            runtime,
            freezer: None,
            staging: directory,
            images,
            work,
            archive: None,
            made: None,
            sent: BTreeSet::new(),
            for_pages,
            standby: None,
            serving: None,
        })
    };
    let checkpoint = freeze::checkpoint(&migration.hands.podman, container);
    let mut checkpoint = std::pin::pin!(checkpoint);
    let mut shell = tokio::select! {
        biased;
        shell = call => shell?,
        // Before livemig was asked: it was not the runtime.
        made = &mut checkpoint => {
            drop(made?);
            return Err(not_called.into());
        }
    };
    let archive = checkpoint.await?;
    drop(rendezvous);
    shell.archive = Some(bundle::without_volumes(archive).boxed());
    migration.shell = Some(shell);
    Ok(())
}

impl Migration<'_> {
    pub(super) fn shell(&mut self) -> Result<&mut Shell> {
        self.shell.as_mut().ok_or(Error::OutOfOrder("shell"))
    }

    /// Sends the destination a part of the container that goes ahead, and waits until it has taken it.
    pub(super) async fn send_part<S>(&mut self, part: &str, content: S) -> Result<Progress>
    where
        S: Stream<Item = bundle::Result<Bytes>> + Send + 'static,
    {
        let (bytes, progress) = bundle::send(content);
        let path = format!("/v1/migrations/{}/{part}", self.id);
        let within = self.request.config.shell_timeout;
        let Nothing {} = self
            .connection
            .send_stream(Method::PUT, &path, HeaderMap::new(), bytes, within)
            .await
            .map_err(Error::of_host(&self.request.to))?;
        self.bytes_sent += progress.wire();
        Ok(progress)
    }
}

/// Has the destination make the container, all but its processes.
///
/// Podman there waits for them, and not for ever: whatever takes long is done before.
pub(super) async fn send(migration: &mut Migration<'_>) -> Result<()> {
    let archive = migration.shell()?.archive.take();
    let archive = archive.ok_or(Error::OutOfOrder("archive"))?;
    migration.send_part("shell", archive).await?;
    migration.shell()?.made = Some(Instant::now());
    Ok(())
}

/// Starts the runtimes on both hosts, up to the point where CRIU has something to do.
pub(super) async fn stand_by(migration: &mut Migration<'_>) -> Result<()> {
    let config = &migration.request.config;
    let within = config.shell_timeout;
    let shell = migration.shell.as_mut().ok_or(Error::OutOfOrder("shell"))?;
    let memory = match migration.request.post_copy {
        true => CriuOption::LazyPages,
        false => CriuOption::PageServer,
    };
    let options = [CriuOption::PacketsAreHeld, memory];
    let standby = Standby::open(config, &shell.work, Verb::Checkpoint, &options)?;
    let mut call = shell
        .checkpoint
        .clone()
        .with_image_path(&shell.images)
        .with_work_path(&shell.work);
    if let rounds @ 1.. = migration.rounds.len() {
        call = call.with_option("--parent-path", &memory::parent(rounds));
    }
    if migration.request.post_copy {
        call = call.lazily(&shell.runtime);
    }
    let runtime = Checkpoint::start(&shell.runtime, &call, standby.environment())?;
    let (runtime, criu) = standby
        .ready_for(runtime, within)
        .await
        .map_err(|error| memory::of_criu(error.into(), &shell.work))?;
    // What the runtime has written by now the other one wants to read before it calls CRIU.
    let images = bundle::images(&shell.images, &mut shell.sent)?;
    migration.send_part("standby", images).await?;
    migration.shell()?.standby = Some((runtime, criu));
    Ok(())
}

/// Makes the directories for CRIU's images and for its log, which nobody else can look into.
pub(crate) fn staging(directory: &Path) -> Result<(PathBuf, PathBuf)> {
    let (images, work) = (directory.join("images"), directory.join("work"));
    make(directory)?;
    make(&images)?;
    make(&work)?;
    Ok((images, work))
}

/// Makes a directory that is nobody else's, and not one that somebody else has put there: the place may be
/// one where all may write.
pub(crate) fn make(path: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .map_err(Error::file("make", path))
}
