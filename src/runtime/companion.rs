//! A process that goes on when livemig has gone, to set right what would be wrong then.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{ExitStatus, Stdio};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin};

use super::setup::own_program;
use super::{Error, Result};
use crate::Config;

/// livemig under another name. What a terminal sends to livemig does not end it.
#[derive(Debug)]
pub(super) struct Companion {
    process: Child,
    /// Closed when this has gone, in whichever way.
    tells: ChildStdin,
}

impl Companion {
    /// Starts it.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn start(
        config: &Config,
        name: &str,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Companion> {
        let program = own_program(config);
        let failed = |source| Error::Start {
            program: program.clone(),
            source,
        };
        let mut command = std::process::Command::new(&program);
        command
            .arg0(name)
            .args(arguments)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut process = tokio::process::Command::from(command)
            .spawn()
            .map_err(failed)?;
        let tells = process.stdin.take();
        let tells = tells.ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Companion { process, tells })
    }

    /// Says a line to it.
    ///
    /// # Errors
    /// [`Error::Lost`] if it has gone.
    pub async fn tell(&mut self, word: &str) -> Result<()> {
        let line = format!("{word}\n");
        let told = self.tells.write_all(line.as_bytes()).await;
        told.map_err(Error::Lost)
    }

    /// Says no more to it, and waits until it has ended.
    ///
    /// # Errors
    /// [`Error::Lost`] if that cannot be waited for.
    pub async fn end(mut self) -> Result<ExitStatus> {
        drop(self.tells);
        self.process.wait().await.map_err(Error::Lost)
    }
}

/// A process that it was told the number of, and that is this one for as long as it has it.
///
/// # Errors
/// `ESRCH` if it has gone.
pub(super) fn process(number: u32) -> io::Result<OwnedFd> {
    let number = i32::try_from(number).ok().and_then(Pid::from_raw);
    let number = number.ok_or(Errno::SRCH)?;
    Ok(pidfd_open(number, PidfdFlags::empty())?)
}
