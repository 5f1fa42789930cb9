//! A container that is made here, all but its processes, and waits for them.
//!
//! Podman has been asked to restore it, and its runtime, which is livemig, waits ([`runtime`]). What comes
//! in the end are CRIU's images, with which the real runtime is run.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open, pidfd_send_signal,
};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::memory::Memory;
use crate::bundle::{self, Limits, TreeId};
use crate::criu::joining::Joining;
use crate::criu::pages::fetch::{Ahead, FirstMoments};
use crate::podman::{self, Client, FailureLog, RestoreOptions, Restored, failure_log};
use crate::runtime::{
    Arrived, CriuOption, Invocation, OnStandby, Outcome, Rendezvous, Standby, Verb,
};
use crate::{Config, Error, runtime};

/// What the kernel calls a userfaultfd in `/proc/PID/fd`.
const USERFAULTFD: &str = "anon_inode:[userfaultfd]";

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
    /// Where the memory comes from then.
    source: Option<Source>,
    moments: FirstMoments,
    /// What fetches it.
    fetching: Option<JoinHandle<Result<(), Error>>>,
    trees: Trees,
    images: PathBuf,
    work: PathBuf,
}

/// Where a container's memory comes from when it runs.
#[derive(Debug)]
struct Source {
    /// What CRIU is given to read it from.
    criu: UnixStream,
    /// Who waits to hear what goes ahead.
    ahead: oneshot::Sender<Ahead>,
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
                    source: None,
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
        self.joining = Some(Joining::without_waiting());
        Ok(())
    }

    /// Has CRIU bring the processes back. Returns the first one's number.
    ///
    /// # Errors
    /// [`Error::Restore`] with what CRIU says.
    pub async fn restore(&mut self) -> Result<u32, Error> {
        self.with_podman()?;
        let fetching = match self.source.take() {
            Some(source) => Some(self.fetch(source).await?),
            None => None,
        };
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
                if let Some(criu) = fetching {
                    let keeper = Keeper::of(&criu, pid)?;
                    self.fetching = Some(tokio::spawn(keeper.watch(criu, self.work.clone())));
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

    /// Opens the way by which memory comes to CRIU, which asks for it there. What is to be fetched ahead is told
    /// when the container is about to be restored.
    ///
    /// # Errors
    /// [`Error::OutOfOrder`] where none is wanted; when the system has no sockets left.
    pub fn source(&mut self) -> Result<(UnixStream, oneshot::Receiver<Ahead>), Error> {
        if !self.post_copy || self.source.is_some() || self.fetching.is_some() {
            return Err(Error::OutOfOrder("post-copy"));
        }
        let (ours, criu) = UnixStream::pair().map_err(crate::criu::Error::Relay)?;
        let (ahead, told) = oneshot::channel();
        self.source = Some(Source { criu, ahead });
        Ok((ours, told))
    }

    /// When the container finds what it needs at first.
    pub fn moments(&self) -> &FirstMoments {
        &self.moments
    }

    /// Starts what gives the container its memory (criu(8), `lazy-pages`), and waits until it is ready.
    async fn fetch(&self, Source { criu, ahead }: Source) -> Result<Child, Error> {
        let images = self.images.clone();
        // While CRIU starts. If nobody waits for it any more, the memory will not come, which CRIU will say.
        tokio::task::spawn_blocking(move || ahead.send(Ahead::of(&images)));
        let start = |source| runtime::Error::Start {
            program: "criu".into(),
            source,
        };
        let source = criu.into_std().map_err(start)?;
        // CRIU waits for what it reads.
        source.set_nonblocking(false).map_err(start)?;
        let mut criu = Command::new("criu")
            .args([
                "lazy-pages",
                "--page-server",
                "--ps-socket",
                "0",
                "--status-fd",
                "1",
            ])
            .args(["-o", "lazy-pages.log", "-v2", "-D"])
            .arg(&self.images)
            .arg("-W")
            .arg(&self.work)
            .current_dir(&self.work)
            .stdin(OwnedFd::from(source))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Until it has a container's memory to look after.
            .kill_on_drop(true)
            .spawn()
            .map_err(start)?;
        let mut ready = criu.stdout.take().ok_or(Error::OutOfOrder("pipe"))?;
        let mut byte = [0];
        match tokio::time::timeout(self.last_words, ready.read_exact(&mut byte)).await {
            Ok(Ok(_)) => Ok(criu),
            _ => {
                // If it has not ended by itself, there is nothing to wait for.
                let _ = criu.start_kill();
                let status = criu.wait().await.map_err(start)?;
                Err(self.failed("criu lazy-pages".to_owned(), status.to_string()))
            }
        }
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

    /// Has the files written to where they are kept.
    ///
    /// # Errors
    /// When a file system fails.
    pub async fn persist(&self, volumes: &BTreeMap<String, PathBuf>) -> Result<(), Error> {
        let trees = volumes.values().chain([&self.trees.rootfs]);
        Ok(bundle::persist(trees.cloned().collect()).await?)
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

/// What stands between a container whose memory is being fetched and pages of zeros.
///
/// The kernel asks for what is touched through userfaultfds, which criu lazy-pages has. When the last copy of
/// one is closed, whoever touches a page that has not come gets zeros and goes on (userfaultfd(2)). So copies
/// are kept here, with which he waits instead; and if the memory does not come, the container is ended
/// before they are closed.
struct Keeper {
    container: OwnedFd,
    faults: Vec<OwnedFd>,
}

impl Keeper {
    fn of(criu: &Child, container: u32) -> Result<Keeper, Error> {
        let process = |number: Option<u32>| {
            let pid = number.and_then(|number| Pid::from_raw(number.cast_signed()));
            let pid = pid.ok_or(rustix::io::Errno::SRCH)?;
            pidfd_open(pid, PidfdFlags::empty())
        };
        let lost = |errno: rustix::io::Errno| Error::from(runtime::Error::Lost(errno.into()));
        let container = process(Some(container)).map_err(lost)?;
        let number = criu.id();
        let criu = process(number).map_err(lost)?;
        let directory = PathBuf::from(format!("/proc/{}/fd", number.unwrap_or_default()));
        let open = std::fs::read_dir(&directory).map_err(Error::file("read", &directory))?;
        let mut faults = Vec::new();
        for entry in open.flatten() {
            let leads_to = std::fs::read_link(entry.path()).unwrap_or_default();
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.parse().ok());
            if let (USERFAULTFD, Some(number)) = (leads_to.to_str().unwrap_or_default(), number) {
                let copy = pidfd_getfd(&criu, number, PidfdGetfdFlags::empty());
                faults.push(copy.map_err(lost)?);
            }
        }
        Ok(Keeper { container, faults })
    }

    /// Waits until all of the memory is there, and ends the container if it does not come.
    async fn watch(self, mut criu: Child, work: PathBuf) -> Result<(), Error> {
        let status = criu.wait().await.map_err(runtime::Error::Lost)?;
        if status.success() {
            return Ok(());
        }
        tracing::error!(%status, "the container's memory does not come: it is ended");
        // It may have ended by itself.
        let _ = pidfd_send_signal(&self.container, Signal::KILL);
        drop(self.faults);
        Err(runtime::Error::Failed {
            program: "criu lazy-pages".to_owned(),
            status: status.to_string(),
            said: failure_log(&work, FailureLog::LazyPages).unwrap_or_default(),
        }
        .into())
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
