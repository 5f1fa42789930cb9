//! A container that is made here, all but its processes, and waits for them.
//!
//! Podman has been asked to restore it, and its runtime, which is livemig, waits ([`runtime`]). What comes
//! in the end are CRIU's images, with which the real runtime is run.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use super::lazy_pages::LazyPages;
use super::memory::Memory;
use crate::bundle::{self, Limits, TreeId};
use crate::criu::joining::Joining;
use crate::criu::pages::fetch::FirstMoments;
use crate::podman::{self, Client, FailureLog, RestoreOptions, Restored, failure_log};
use crate::runtime::{
    Arrived, CriuOption, Invocation, OnStandby, Outcome, Rendezvous, Standby, Verb,
};
use crate::{Config, Error, runtime};

/// A container that waits for its processes.
#[derive(Debug)]
pub(super) struct Shell {
    /// The runtime, as Podman has called it. Without it the container fails.
    runtime: Option<Arrived>,
    /// The same, with a CRIU that waits for the word.
    standby: Option<OnItsMark>,
    /// From then on, until the container runs.
    joining: Option<Joining>,
    /// Podman's own account of the restore.
    restoring: JoinHandle<podman::Result<Restored>>,
    /// Whether Podman has died, or given up.
    deserted: Arc<AtomicBool>,
    /// [`Config::runtime_timeout`].
    last_words: Duration,
    /// Whether memory is fetched when the container runs.
    post_copy: bool,
    /// What fetches it then, and waits for the images.
    lazy_pages: Option<LazyPages>,
    moments: FirstMoments,
    /// The memory, while it is being fetched.
    fetching: Option<JoinHandle<Result<(), Error>>>,
    trees: Trees,
    images: PathBuf,
    work: PathBuf,
}

/// A runtime that has come as far as it can without images.
#[derive(Debug)]
struct OnItsMark {
    program: String,
    runtime: JoinHandle<runtime::Result<Outcome>>,
    criu: OnStandby,
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
        memory: &Memory,
        post_copy: bool,
        config: &Config,
    ) -> Result<Shell, Error>
    where
        S: Stream<Item = bundle::Result<Bytes>> + Send + 'static,
    {
        let (images, work) = (memory.images.clone(), memory.work.clone());
        let within = config.shell_timeout;
        let podman = podman.clone();
        let deserted = Arc::new(AtomicBool::new(false));
        let note = deserted.clone();
        let mut restoring = tokio::spawn(async move {
            let options = RestoreOptions {
                tcp_established: true,
                file_locks: true,
                // Podman makes them, and livemig fills them.
                ignore_volumes: true,
                ..RestoreOptions::default()
            };
            let restored = podman.restore(archive, &options).await;
            note.store(restored.is_err(), Ordering::Relaxed);
            restored
        });
        tokio::select! {
            arrived = rendezvous.arrival(within) => {
                let runtime = arrived?;
                Ok(Shell {
                    trees: Trees::of(runtime.invocation())?,
                    runtime: Some(runtime),
                    standby: None,
                    joining: None,
                    post_copy,
                    lazy_pages: None,
                    moments: FirstMoments::default(),
                    fetching: None,
                    restoring,
                    deserted,
                    last_words: config.runtime_timeout,
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
        bundle::apply(changes, place, limits()).await?;
        Ok(())
    }

    /// Starts the runtime, up to the point where CRIU has something to do.
    ///
    /// # Errors
    /// When it does not come so far.
    pub async fn stand_by(&mut self, config: &Config) -> Result<(), Error> {
        let runtime = self
            .runtime
            .take()
            .ok_or(Error::OutOfOrder("waiting runtime"))?;
        // A page that has been read is not needed any more: there is never a second copy of them all.
        let memory = match self.post_copy {
            true => CriuOption::LazyPages,
            false => CriuOption::GiveImagesBack,
        };
        let options = [CriuOption::PacketsAreHeld, memory];
        let standby = Standby::open(config, &self.work, Verb::Restore, &options)?;
        let mut call = runtime
            .invocation()
            .clone()
            .with_image_path(&self.images)
            .with_work_path(&self.work);
        if self.post_copy {
            call = call.lazily(runtime.program());
        }
        let program = runtime.program().display().to_string();
        let environment = standby.environment();
        let mut runtime = tokio::spawn(async move { runtime.run(&call, environment).await });
        let criu = tokio::select! {
            criu = standby.ready(config.shell_timeout) => criu?,
            ended = &mut runtime => return Err(match joined(ended)? {
                // It called another CRIU than livemig, which had nothing to restore.
                Outcome { success: true, .. } => Error::OutOfOrder("CRIU's images"),
                Outcome { status, .. } => self.failed(program, status),
            }),
        };
        self.standby = Some(OnItsMark {
            program,
            runtime,
            criu,
        });
        if self.post_copy {
            let lazy_pages = LazyPages::start(config, &self.images, &self.work);
            self.lazy_pages = Some(lazy_pages.await?);
        }
        self.joining = Some(Joining::without_waiting());
        Ok(())
    }

    /// Has CRIU bring the processes back. Returns the first one's number.
    ///
    /// # Errors
    /// [`Error::Restore`] with what CRIU says.
    pub async fn restore(&mut self) -> Result<u32, Error> {
        self.with_podman()?;
        let mut lazy_pages = self.lazy_pages.take();
        if let Some(lazy_pages) = &mut lazy_pages
            && let Err(error) = lazy_pages.go(&self.images).await
        {
            return Err(self.failed("criu lazy-pages".to_owned(), error.to_string()));
        }
        let standby = self.standby.take();
        let OnItsMark {
            program,
            runtime,
            criu,
        } = standby.ok_or(Error::OutOfOrder("runtime on standby"))?;
        let went = criu.go().await;
        let outcome = runtime.await;
        drop(self.joining.take());
        // If CRIU has gone, its runtime says why.
        match joined(outcome)? {
            Outcome {
                success: true,
                pid: Some(pid),
                ..
            } => {
                went?;
                if let Some(lazy_pages) = lazy_pages {
                    self.fetching = Some(tokio::spawn(lazy_pages.keep(pid)?));
                }
                self.with_podman()?;
                Ok(pid)
            }
            Outcome { status, .. } => Err(self.failed(program, status)),
        }
    }

    /// A container that is brought to life and of which Podman knows nothing could never be stopped again.
    fn with_podman(&self) -> Result<(), Error> {
        if self.deserted.load(Ordering::Relaxed) {
            return Err(runtime::Error::Deserted.into());
        }
        Ok(())
    }

    /// Opens the way by which memory comes to CRIU, which asks for it there.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] where none is wanted, or it is open already.
    pub fn source(&mut self) -> Result<UnixStream, Error> {
        let criu = self.lazy_pages.as_mut().and_then(LazyPages::pages);
        criu.ok_or(Error::OutOfOrder("post-copy"))
    }

    /// When the container finds what it needs at first.
    pub fn moments(&self) -> &FirstMoments {
        &self.moments
    }

    fn failed(&self, program: String, status: String) -> Error {
        let said = failure_log(&self.work, FailureLog::Restore);
        let source = runtime::Error::Failed {
            program,
            status,
            said: said.clone().unwrap_or_default(),
        };
        Error::Restore {
            source: Box::new(source.into()),
            reason: said.unwrap_or_else(|| "nothing".to_owned()),
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

    /// Waits until the container has all of its memory, if it was fetched. Once the source has served the last
    /// page that is at once.
    ///
    /// # Errors
    /// [`runtime::Error::Failed`] if it does not get it.
    pub async fn fetched(&mut self) -> Result<(), Error> {
        match self.fetching.take() {
            Some(fetching) => joined(fetching.await),
            None => Ok(()),
        }
    }

    /// Has Podman give up the container, if it does not run yet, and waits until it has.
    pub async fn abandon(mut self) {
        // The wrapper notices, fails, and so does what Podman was asked for.
        drop(self.runtime.take());
        drop(self.standby.take());
        drop(self.joining.take());
        drop(self.lazy_pages.take());
        if tokio::time::timeout(self.last_words, &mut self.restoring)
            .await
            .is_err()
        {
            tracing::warn!("Podman still waits for its runtime");
        }
    }
}

/// Brings content into volumes of which there is no container yet.
///
/// # Errors
/// As [`Shell::bring_in`].
pub async fn fill<S>(content: S, volumes: BTreeMap<String, PathBuf>) -> Result<(), Error>
where
    S: Stream<Item = bundle::Result<Bytes>> + Send,
{
    let place = move |tree: &TreeId| match tree {
        TreeId::Volume(name) => volumes.get(name).cloned(),
        TreeId::Rootfs | TreeId::Shm => None,
    };
    bundle::apply(content, place, limits()).await?;
    Ok(())
}

fn limits() -> Limits {
    Limits {
        // What a node gives access to is for the container's cgroup to say, as in any image.
        devices: true,
        ..Limits::default()
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
