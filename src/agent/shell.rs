//! A container that is made here, all but its processes, and waits for them.
//!
//! Podman has been asked to restore it, and its runtime, which is livemig, waits ([`runtime`]). What comes
//! in the end are CRIU's images, with which the real runtime is run.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use tokio::io::AsyncReadExt;
use tokio::task::JoinHandle;
use tokio_util::io::StreamReader;

use crate::bundle;
use crate::podman::{self, Client, FailureLog, RestoreOptions, Restored, failure_log};
use crate::runtime::dump::CriuOptions;
use crate::runtime::{Arrived, Outcome, Rendezvous};
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
                ..RestoreOptions::default()
            };
            podman.restore(archive, &options).await
        });
        let (images, work) = staging;
        tokio::select! {
            arrived = rendezvous.arrival(within) => Ok(Shell {
                runtime: Some(arrived?),
                restoring,
                images,
                work,
            }),
            ended = &mut restoring => Err(match joined(ended) {
                Err(error) => error.into(),
                // It did not ask livemig, and has restored a container without processes.
                Ok(_) => runtime::Error::NotCalled { verb: runtime::Verb::Restore, within }.into(),
            }),
        }
    }

    /// Takes the images, and makes sure that they are as they were sent.
    ///
    /// # Errors
    /// Those of the stream, and of files that cannot be written.
    pub async fn receive<S>(&self, content: S) -> Result<(), Error>
    where
        S: Stream<Item = bundle::Result<Bytes>> + Send,
    {
        let reader = StreamReader::new(content.map_err(std::io::Error::other));
        let mut reader = std::pin::pin!(reader);
        bundle::write_images(&mut reader, &self.images).await?;
        // Whether the digest is right is known at the end of the stream, and not before.
        let mut rest = Vec::new();
        let more = reader.take(1).read_to_end(&mut rest).await;
        more.map_err(bundle::Error::from_reader)?;
        if !rest.is_empty() {
            return Err(bundle::Error::Images("something follows them".to_owned()).into());
        }
        Ok(())
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
        let environment = CriuOptions::packets_are_held().write(&self.work.join("criu.conf"))?;
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

/// What a task has returned; that it panicked goes on here.
fn joined<T>(ended: Result<T, tokio::task::JoinError>) -> T {
    ended.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic()))
}
