//! `criu lazy-pages` (criu(8)): what gives a container its memory when it runs already.
//!
//! It takes some milliseconds to begin, so it is started while the container still runs at its source, where there
//! are no images yet. What it reads first is their inventory: in its place is a named pipe at which it waits.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::process::{Child, ChildStdout, Command};

use crate::podman::{FailureLog, failure_log};
use crate::runtime::{Faults, Keeper};
use crate::{Config, Error, runtime};

/// What CRIU looks into first (`check_img_inventory` in `criu/image.c`).
const INVENTORY: &str = "inventory.img";
/// How long to wait between two looks whether CRIU has come to where it waits.
const LOOK: Duration = Duration::from_millis(1);

/// A CRIU that waits for the images of a container, and then gives it its memory.
#[derive(Debug)]
pub(super) struct LazyPages {
    criu: Child,
    /// Says when it is ready.
    says: ChildStdout,
    /// Lets it go on.
    inventory: Option<File>,
    /// Where it asks for pages and reads them, until somebody takes it.
    pages: Option<UnixStream>,
    /// What ends the container if this agent dies before it has its memory.
    keeper: Keeper,
    work: PathBuf,
    /// How long it is waited for.
    within: Duration,
}

impl LazyPages {
    /// Starts it in the directory in which the images will be, and waits until it waits for them.
    ///
    /// # Errors
    /// [`runtime::Error::Failed`] if it does not come so far.
    pub async fn start(config: &Config, images: &Path, work: &Path) -> Result<LazyPages, Error> {
        let within = config.runtime_timeout;
        let start = |source| runtime::Error::Start {
            program: "criu".into(),
            source,
        };
        let pipe = images.join(INVENTORY);
        let ours = Mode::RUSR | Mode::WUSR;
        mknodat(CWD, &pipe, FileType::Fifo, ours, 0)
            .map_err(|errno| Error::file("make", &pipe)(errno.into()))?;
        let (pages, asks) = UnixStream::pair().map_err(start)?;
        let asks = asks.into_std().map_err(start)?;
        // CRIU waits for what it reads.
        asks.set_nonblocking(false).map_err(start)?;
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
            .arg(images)
            .arg("-W")
            .arg(work)
            .current_dir(work)
            .stdin(OwnedFd::from(asks))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Until it has a container's memory to look after.
            .kill_on_drop(true)
            .spawn()
            .map_err(start)?;
        let says = criu.stdout.take().ok_or(Error::OutOfOrder("pipe"))?;
        let keeper = Keeper::start(config, criu.id().unwrap_or_default())?;
        let began = Instant::now();
        let inventory = loop {
            // There is somebody at the other end, or it fails.
            let opened = OpenOptions::new()
                .write(true)
                // Bits of open(2).
                .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
                .open(&pipe);
            if let Ok(opened) = opened {
                break opened;
            }
            let ended = criu.try_wait().map_err(runtime::Error::Lost)?;
            if ended.is_some() || began.elapsed() >= within {
                let status = ended.map_or("it does not look for images".to_owned(), |status| {
                    status.to_string()
                });
                return Err(failed(work, status));
            }
            tokio::time::sleep(LOOK).await;
        };
        // It has it open, and the images come here.
        std::fs::remove_file(&pipe).map_err(Error::file("remove", &pipe))?;
        Ok(LazyPages {
            criu,
            says,
            inventory: Some(inventory),
            pages: Some(pages),
            keeper,
            work: work.to_owned(),
            within,
        })
    }

    /// Where it asks for pages and reads them. There is one of it.
    pub fn pages(&mut self) -> Option<UnixStream> {
        self.pages.take()
    }

    /// The images are here: waits until it is ready.
    ///
    /// # Errors
    /// [`runtime::Error::Failed`] if it does not come so far.
    pub async fn go(&mut self, images: &Path) -> Result<(), Error> {
        let path = images.join(INVENTORY);
        let inventory = std::fs::read(&path).map_err(Error::file("read", &path))?;
        let pipe = self.inventory.take();
        let mut pipe = pipe.ok_or(Error::OutOfOrder("CRIU"))?;
        pipe.write_all(&inventory)
            .map_err(Error::file("pass on", &path))?;
        // That was all of it.
        drop(pipe);
        let mut byte = [0];
        match tokio::time::timeout(self.within, self.says.read_exact(&mut byte)).await {
            Ok(Ok(_)) => Ok(()),
            _ => {
                // If it has not ended by itself, there is nothing to wait for.
                let _ = self.criu.start_kill();
                let status = self.criu.wait().await.map_err(runtime::Error::Lost)?;
                Err(failed(&self.work, status.to_string()))
            }
        }
    }

    /// The container is there. Returns what ends when it has all of its memory, and ends it if that does not come.
    ///
    /// # Errors
    /// [`runtime::Error::Lost`] if the container, or CRIU, has gone.
    pub fn keep(
        self,
        container: u32,
    ) -> Result<impl Future<Output = Result<(), Error>> + Send + use<>, Error> {
        let criu = self.criu.id().unwrap_or_default();
        let faults = Faults::of(criu, container).map_err(runtime::Error::Lost)?;
        Ok(self.fetched(container, faults))
    }

    /// Waits until all of the memory is there, and ends the container if it does not come.
    async fn fetched(mut self, container: u32, faults: Faults) -> Result<(), Error> {
        if let Err(error) = self.keeper.keep(container).await {
            tracing::warn!(%error, "if this agent dies the container may go on without its memory");
        }
        let status = self.criu.wait().await.map_err(runtime::Error::Lost)?;
        if status.success() {
            if let Err(error) = self.keeper.done().await {
                tracing::debug!(%error, "what would have ended the container had gone before");
            }
            return Ok(());
        }
        tracing::error!(%status, "the container's memory does not come: it is ended");
        faults.end_container();
        Err(failed(&self.work, status.to_string()))
    }
}

fn failed(work: &Path, status: String) -> Error {
    runtime::Error::Failed {
        program: "criu lazy-pages".to_owned(),
        status,
        said: failure_log(work, FailureLog::LazyPages).unwrap_or_default(),
    }
    .into()
}
