//! Where livemig and the wrapper of the runtime meet.
//!
//! Whoever has asked Podman for a checkpoint or a restore listens on a socket named after it. The wrapper
//! connects, says how it was called (`Call`), and is told what to do (`Order`); if it is to run the
//! real runtime it says how that ended ([`Outcome`]). Each is one line of JSON.
//!
//! The directory of these sockets is root's alone, as both sides are.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};

use super::{Error, Invocation, Result, Verb};
use crate::podman::ContainerId;

/// The form of the messages. Both sides are the same program, unless it was replaced in between.
pub(super) const VERSION: u32 = 1;
/// A longer message is none: command lines of runtimes have a few hundred bytes.
pub(super) const LONGEST: u64 = 64 << 10;

/// How the runtime was called.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Call {
    pub version: u32,
    /// The real runtime.
    pub program: PathBuf,
    pub invocation: Invocation,
}

/// What the wrapper is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
pub(super) enum Order {
    /// Say that the checkpoint is done. There is none.
    Pretend,
    /// Run the real runtime like this, and say how it ended.
    Run {
        arguments: Vec<String>,
        environment: BTreeMap<String, PathBuf>,
    },
    /// Say that it failed.
    Refuse { reason: String },
}

/// How the real runtime ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether it was content.
    pub success: bool,
    /// How it ended, in words.
    pub status: String,
    /// The container's first process, if it was brought back.
    pub pid: Option<u32>,
}

/// A place where a call of the runtime is waited for. It goes with the value.
#[derive(Debug)]
pub struct Rendezvous {
    listener: UnixListener,
    path: PathBuf,
    verb: Verb,
}

/// A wrapper that waits to be told what to do. If it is dropped the wrapper fails, and with it what
/// Podman was asked for.
#[derive(Debug)]
pub struct Arrived {
    stream: BufReader<UnixStream>,
    call: Call,
}

/// Where the socket for this call is.
///
/// A socket's path has at most 107 bytes (`sun_path` in unix(7)), so half of the container's number has to
/// do: 128 bits, and no two containers of a host share that many.
pub(super) fn socket(directory: &Path, verb: Verb, container: &ContainerId) -> PathBuf {
    let number = container.as_str();
    directory.join(format!("{verb}-{}", &number[..number.len() / 2]))
}

impl Rendezvous {
    /// Begins to listen, before Podman is asked.
    ///
    /// # Errors
    /// When the directory or the socket cannot be made.
    pub fn open(directory: &Path, verb: Verb, container: &ContainerId) -> Result<Rendezvous> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(Error::file("make", directory))?;
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700))
            .map_err(Error::file("close to others", directory))?;
        let path = socket(directory, verb, container);
        // One that a crash has left: only one migration at a time works on a container.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::file("remove", path)(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(Error::file("listen on", &path))?;
        Ok(Rendezvous {
            listener,
            path,
            verb,
        })
    }

    /// Waits for Podman to call.
    ///
    /// # Errors
    /// [`Error::NotCalled`] if it does not within that time; [`Error::Call`] if it is not understood.
    pub async fn arrival(&self, within: Duration) -> Result<Arrived> {
        let arrive = async {
            let (stream, _) = self.listener.accept().await.map_err(Error::Lost)?;
            let mut stream = BufReader::new(stream);
            let call: Call = read(&mut stream).await?;
            if call.version != VERSION {
                return Err(Error::Call(format!(
                    "it has version {}, not {VERSION}: was livemig replaced just now?",
                    call.version
                )));
            }
            Ok(Arrived { stream, call })
        };
        tokio::time::timeout(within, arrive)
            .await
            .unwrap_or(Err(Error::NotCalled {
                verb: self.verb,
                within,
            }))
    }
}

impl Drop for Rendezvous {
    fn drop(&mut self) {
        // If it is gone already there is nothing to remove.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Arrived {
    /// How it was called.
    pub fn invocation(&self) -> &Invocation {
        &self.call.invocation
    }

    /// The real runtime.
    pub fn program(&self) -> &Path {
        &self.call.program
    }

    /// Has it say that the checkpoint is done.
    ///
    /// # Errors
    /// When it has gone.
    pub async fn pretend(mut self) -> Result<()> {
        write(&mut self.stream, &Order::Pretend).await
    }

    /// Has it fail, for this reason.
    ///
    /// # Errors
    /// When it has gone.
    pub async fn refuse(mut self, reason: &str) -> Result<()> {
        let reason = reason.to_owned();
        write(&mut self.stream, &Order::Refuse { reason }).await
    }

    /// Has it run the real runtime, and waits for the end.
    ///
    /// # Errors
    /// When it has gone. It may have started the runtime by then.
    pub async fn run(
        mut self,
        invocation: &Invocation,
        environment: BTreeMap<String, PathBuf>,
    ) -> Result<Outcome> {
        let order = Order::Run {
            arguments: invocation.arguments().to_vec(),
            environment,
        };
        write(&mut self.stream, &order).await?;
        read(&mut self.stream).await
    }
}

async fn read<T: DeserializeOwned>(stream: &mut BufReader<UnixStream>) -> Result<T> {
    let mut line = Vec::new();
    let mut bounded = stream.take(LONGEST);
    bounded
        .read_until(b'\n', &mut line)
        .await
        .map_err(Error::Lost)?;
    if line.last() != Some(&b'\n') {
        return Err(Error::Lost(io::ErrorKind::UnexpectedEof.into()));
    }
    serde_json::from_slice(&line).map_err(|error| Error::Call(error.to_string()))
}

async fn write<T: Serialize>(stream: &mut BufReader<UnixStream>, message: &T) -> Result<()> {
    let line = line(message).map_err(Error::Lost)?;
    stream.write_all(&line).await.map_err(Error::Lost)
}

pub(super) fn line<T: Serialize>(message: &T) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}
