//! CRIU on standby: called by its runtime, and waiting for livemig's word before it begins.
//!
//! A runtime takes as long to come to the point as CRIU takes for a small container. All of that can be
//! done while the container still runs: the runtime is started early, and what it calls as `criu` is
//! livemig ([`held_criu`](super::held_criu)), which becomes CRIU when it is told to.
//!
//! CRIU connects to a socket here, and waits on that connection for one byte. For a dump, the connection
//! then is the one over which CRIU sends the container's memory (`--ps-socket` in criu(8)): unlike a TCP
//! connection it is nobody else's, and does not wait 200 ms for more before it sends the last bytes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};

use super::setup::criu_path;
use super::{Checkpoint, Error, Result, Verb};
use crate::Config;

/// The variable that names the socket.
pub(super) const SOCKET: &str = "LIVEMIG_CRIU";
/// The variable that names the file of options that only this CRIU sees; CRIU reads it after
/// `default.conf` (criu(8), "CONFIGURATION FILES"). Some options crash it in the file that a runtime hands
/// over.
pub(super) const OPTIONS: &str = "CRIU_CONFIG_FILE";
/// What lets CRIU begin.
pub(super) const GO: u8 = b'g';

/// What CRIU is told beyond what the runtime tells it: lines of criu(8)'s options without the dashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CriuOption {
    /// Somebody else keeps packets from the container. CRIU's own way takes 15 to 100 ms on either side.
    PacketsAreHeld,
    /// Pages go to a page server: over the connection, the number of whose descriptor CRIU is told too.
    PageServer,
    /// Memory stays where it is until somebody asks for it: over the connection, once all else is dumped.
    LazyPages,
    /// What has been read of the images is removed from them.
    GiveImagesBack,
}

impl CriuOption {
    fn line(self) -> &'static str {
        match self {
            CriuOption::PacketsAreHeld => "network-lock skip\n",
            CriuOption::PageServer => "page-server\n",
            CriuOption::LazyPages => "lazy-pages\n",
            CriuOption::GiveImagesBack => "auto-dedup\n",
        }
    }
}

/// Waits for a CRIU that is about to be called. It goes with the value.
#[derive(Debug)]
pub struct Standby {
    listener: UnixListener,
    socket: PathBuf,
    options: PathBuf,
    path: PathBuf,
    verb: Verb,
}

/// A CRIU that waits for a word. If it is dropped CRIU fails, and its runtime with it.
#[derive(Debug)]
pub struct OnStandby(UnixStream);

impl Standby {
    /// Begins to wait, with its files in `directory`, which is nobody else's.
    ///
    /// # Errors
    /// When one of them cannot be made.
    pub fn open(
        config: &Config,
        directory: &Path,
        verb: Verb,
        options: &[CriuOption],
    ) -> Result<Standby> {
        let file = directory.join("criu.conf");
        let text: String = options.iter().map(|option| option.line()).collect();
        std::fs::write(&file, text).map_err(Error::file("write", &file))?;
        let socket = directory.join("criu.sock");
        let listener = UnixListener::bind(&socket).map_err(Error::file("listen on", &socket))?;
        Ok(Standby {
            listener,
            socket,
            options: file,
            path: criu_path(config),
            verb,
        })
    }

    /// What has to be in the runtime's environment.
    pub fn environment(&self) -> BTreeMap<String, PathBuf> {
        let mut path = self.path.clone().into_os_string();
        if let Some(others) = std::env::var_os("PATH") {
            path.push(":");
            path.push(others);
        }
        BTreeMap::from([
            ("PATH".to_owned(), path.into()),
            (SOCKET.to_owned(), self.socket.clone()),
            (OPTIONS.to_owned(), self.options.clone()),
        ])
    }

    /// Waits until CRIU is called.
    ///
    /// # Errors
    /// [`Error::NotCalled`] if it is not within that time.
    pub async fn ready(&self, within: Duration) -> Result<OnStandby> {
        match tokio::time::timeout(within, self.listener.accept()).await {
            Ok(Ok((stream, _))) => Ok(OnStandby(stream)),
            Ok(Err(error)) => Err(Error::Lost(error)),
            Err(_) => Err(Error::NotCalled {
                verb: self.verb,
                within,
            }),
        }
    }

    /// Waits until this runtime calls CRIU, or has ended without.
    ///
    /// # Errors
    /// [`Error::NotCalled`] if it is not within that time; [`Error::Failed`] with the runtime's last words.
    pub async fn ready_for(
        &self,
        mut runtime: Checkpoint,
        within: Duration,
    ) -> Result<(Checkpoint, OnStandby)> {
        let not_called = Error::NotCalled {
            verb: self.verb,
            within,
        };
        tokio::select! {
            biased;
            ready = self.ready(within) => Ok((runtime, ready?)),
            ended = runtime.exited() => {
                ended?;
                runtime.ended().await?;
                Err(not_called)
            }
        }
    }
}

impl OnStandby {
    /// The number of the process that will be CRIU.
    ///
    /// # Errors
    /// When it has gone.
    pub fn process(&self) -> Result<u32> {
        let peer = self.0.peer_cred().map_err(Error::Lost)?;
        // The kernel numbers it; a process without a number here is in another PID namespace.
        let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok());
        pid.filter(|pid| *pid != 0)
            .ok_or_else(|| Error::Lost(std::io::ErrorKind::NotFound.into()))
    }

    /// Lets it begin. Over what is returned a dump sends its pages.
    ///
    /// # Errors
    /// When it has gone.
    pub async fn go(mut self) -> Result<UnixStream> {
        self.0.write_all(&[GO]).await.map_err(Error::Lost)?;
        Ok(self.0)
    }
}
