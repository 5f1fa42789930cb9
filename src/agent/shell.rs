//! A container that is made here, all but its processes, and waits for them.
//!
//! Podman has been asked to restore it, and its runtime, which is livemig, waits ([`runtime`]). What comes
//! in the end are CRIU's images, with which the real runtime is run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{Stream, TryStreamExt};
use tokio::task::JoinHandle;
use tokio_util::io::{ReaderStream, StreamReader};

use crate::bundle::{self, Limits, TreeId};
use crate::criu::pages::Layout;
use crate::criu::pages::writer::PageWriter;
use crate::podman::{self, Client, FailureLog, RestoreOptions, Restored, failure_log};
use crate::runtime::dump::CriuOptions;
use crate::runtime::{Arrived, Invocation, Outcome, Rendezvous};
use crate::{Error, runtime};

/// How long Podman may take to notice that its runtime has failed, and to say so.
const LAST_WORDS: Duration = Duration::from_secs(30);

/// A container that waits for its processes.
#[derive(Debug)]
pub(super) struct Shell {
    /// The runtime, as Podman has called it. Without it the container fails.
    runtime: Option<Arrived>,
    /// Podman's own account of the restore.
    restoring: JoinHandle<podman::Result<Restored>>,
    trees: Trees,
    images: PathBuf,
    work: PathBuf,
}

impl Shell {
    /// Has Podman make a container of an archive, and waits until it calls its runtime.
    ///
    /// # Errors
    /// What Podman says if it does not come so far; [`runtime::Error::NotCalled`].
    pub async fn make<S>(
        podman: &Client,
        archive: S,
        rendezvous: &Rendezvous,
        staging: (PathBuf, PathBuf),
        within: Duration,
    ) -> Result<Shell, Error>
    where
        S: Stream<Item = bundle::Result<Bytes>> + Send + 'static,
    {
        let podman = podman.clone();
        let mut restoring = tokio::spawn(async move {
            let options = RestoreOptions {
                tcp_established: true,
                file_locks: true,
                // Podman makes them, and livemig fills them.
                ignore_volumes: true,
                ..RestoreOptions::default()
            };
            podman.restore(archive, &options).await
        });
        let (images, work) = staging;
        tokio::select! {
            arrived = rendezvous.arrival(within) => {
                let runtime = arrived?;
                Ok(Shell {
                    trees: Trees::of(runtime.invocation())?,
                    runtime: Some(runtime),
                    restoring,
                    images,
                    work,
                })
            }
            ended = &mut restoring => Err(match joined(ended) {
                Err(error) => error.into(),
                // It did not ask livemig, and has restored a container without processes.
                Ok(_) => runtime::Error::NotCalled { verb: runtime::Verb::Restore, within }.into(),
            }),
        }
    }

    /// Brings what has changed in the container's files into those that are here.
    ///
    /// # Errors
    /// Those of the stream, which ends only if it is as it was sent; [`bundle::Error::Entry`] for what
    /// may not be.
    pub async fn bring_in<S>(
        &self,
        changes: S,
        volumes: BTreeMap<String, PathBuf>,
    ) -> Result<(), Error>
    where
        S: Stream<Item = bundle::Result<Bytes>> + Send,
    {
        let trees = self.trees.clone();
        let place = move |tree: &TreeId| match tree {
            TreeId::Rootfs => Some(trees.rootfs.clone()),
            TreeId::Shm => Some(trees.shm.clone()),
            TreeId::Volume(name) => volumes.get(name).cloned(),
        };
        let limits = Limits {
            // What a node gives access to is for the container's cgroup to say, as in any image.
            devices: true,
            ..Limits::default()
        };
        bundle::apply(changes, place, limits).await?;
        Ok(())
    }

    /// Takes the pages of the container's memory.
    ///
    /// # Errors
    /// Those of the stream; [`crate::criu::Error::Pages`] if it is not CRIU's, and
    /// [`crate::criu::Error::Write`] if there is no room.
    pub async fn take_pages<S>(&self, pages: S, layout: Layout) -> Result<(), Error>
    where
        S: Stream<Item = bundle::Result<Bytes>> + Send,
    {
        let mut writer = PageWriter::new(&self.images, layout);
        let mut pages = std::pin::pin!(pages);
        while let Some(piece) = pages.try_next().await? {
            // Into memory, which does not wait.
            writer.feed(&piece)?;
        }
        let bytes = writer.finish()?;
        tracing::debug!(bytes, "the container's memory is here");
        Ok(())
    }

    /// Takes CRIU's images. Returns what follows them.
    ///
    /// # Errors
    /// Those of the stream, and of files that cannot be written.
    pub async fn take_images(
        &self,
        content: BoxStream<'static, bundle::Result<Bytes>>,
    ) -> Result<impl Stream<Item = bundle::Result<Bytes>> + Send + use<>, Error> {
        let mut reader = StreamReader::new(content.map_err(std::io::Error::other));
        bundle::write_images(&mut reader, &self.images).await?;
        let rest = ReaderStream::new(reader);
        Ok(rest.map_err(bundle::Error::from_reader))
    }

    /// Has the runtime bring the processes back. Returns the first one's number.
    ///
    /// # Errors
    /// [`Error::Restore`] with what CRIU says.
    pub async fn restore(&mut self) -> Result<u32, Error> {
        let runtime = self
            .runtime
            .take()
            .ok_or(Error::OutOfOrder("waiting runtime"))?;
        let call = runtime.invocation().clone();
        let call = call
            .with_image_path(&self.images)
            .with_work_path(&self.work);
        // A page that has been read is not needed any more: there is never a second copy of them all.
        let options = CriuOptions::packets_are_held().with("auto-dedup");
        let environment = options.write(&self.work.join("criu.conf"))?;
        let program = runtime.program().display().to_string();
        match runtime.run(&call, environment).await? {
            Outcome {
                success: true,
                pid: Some(pid),
                ..
            } => Ok(pid),
            Outcome { status, .. } => {
                let said = failure_log(&self.work, FailureLog::Restore);
                let source = runtime::Error::Failed {
                    program,
                    status,
                    said: said.clone().unwrap_or_default(),
                };
                Err(Error::Restore {
                    source: Box::new(source.into()),
                    reason: said.unwrap_or_else(|| "nothing".to_owned()),
                })
            }
        }
    }

    /// Waits until Podman has taken down that the container runs.
    ///
    /// # Errors
    /// What Podman says if it has not.
    pub async fn recorded(self) -> Result<(), Error> {
        joined(self.restoring.await)?;
        Ok(())
    }

    /// Has Podman give up the container, if it does not run yet, and waits until it has.
    pub async fn abandon(mut self) {
        // The wrapper notices, fails, and so does what Podman was asked for.
        drop(self.runtime.take());
        if tokio::time::timeout(LAST_WORDS, &mut self.restoring)
            .await
            .is_err()
        {
            tracing::warn!("Podman still waits for its runtime");
        }
    }
}

/// Where a container's files are, of which Podman says nothing while it works on the container.
#[derive(Debug, Clone)]
struct Trees {
    rootfs: PathBuf,
    shm: PathBuf,
}

impl Trees {
    /// Those of the container that the runtime was called for: its bundle's configuration is the runtime's
    /// own source (`config.md` of the OCI runtime specification), and beside it is what Podman mounts at
    /// `/dev/shm` (`ShmDir` in Podman's `libpod/container_config.go`).
    fn of(call: &Invocation) -> Result<Trees, Error> {
        #[derive(serde::Deserialize)]
        struct Configuration {
            root: Root,
        }
        #[derive(serde::Deserialize)]
        struct Root {
            path: PathBuf,
        }
        let unclear = |what: String| Error::from(runtime::Error::Call(what));
        let bundle = call
            .option("--bundle")
            .ok_or_else(|| unclear("it names no --bundle".to_owned()))?;
        let bundle = PathBuf::from(bundle);
        let path = bundle.join("config.json");
        let text = std::fs::read(&path).map_err(Error::file("read", &path))?;
        let configuration: Configuration =
            serde_json::from_slice(&text).map_err(|error| unclear(error.to_string()))?;
        Ok(Trees {
            // An absolute one stays as it is.
            rootfs: bundle.join(configuration.root.path),
            shm: bundle.join("shm"),
        })
    }
}

/// What a task has returned; that it panicked goes on here.
fn joined<T>(ended: Result<T, tokio::task::JoinError>) -> T {
    ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}
