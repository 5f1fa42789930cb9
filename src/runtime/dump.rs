//! Dumping a frozen container with the real runtime, as Podman would have it done.
//!
//! The arguments are those with which Podman itself called for the checkpoint ([`super::rendezvous`]), so
//! that whatever it has the runtime do differently for this container is done; only where the images go
//! is changed.
//!
//! CRIU would keep packets away from the container's sockets by rules of its own, for 15 to 100 ms on
//! either side. livemig holds the packets already, so CRIU is told to skip that, by a file of options that
//! only this one call sees: `CRIU_CONFIG_FILE`, which CRIU reads after `default.conf` (criu(8),
//! "CONFIGURATION FILES"). In a file that the runtime hands over the same option would crash it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use super::{Error, Invocation, Result};

/// The variable that names the file of options.
const VARIABLE: &str = "CRIU_CONFIG_FILE";
/// Of what the runtime says no more than this is passed on, in bytes.
const MOST_WORDS: usize = 4 << 10;

/// What CRIU is told beyond what the runtime tells it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CriuOptions(Vec<String>);

impl CriuOptions {
    /// Somebody else keeps packets from the container.
    pub fn packets_are_held() -> CriuOptions {
        CriuOptions(vec!["network-lock skip".to_owned()])
    }

    /// One line more, as in criu(8) without the dashes.
    #[must_use]
    pub fn with(mut self, option: impl Into<String>) -> CriuOptions {
        self.0.push(option.into());
        self
    }

    /// Writes them into a file, and returns what has to be in the runtime's environment.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, file: &Path) -> Result<BTreeMap<String, PathBuf>> {
        let text: String = self.0.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(file, text).map_err(Error::file("write", file))?;
        Ok(BTreeMap::from([(VARIABLE.to_owned(), file.to_owned())]))
    }
}

/// Has the real runtime do what it was called for, and waits for it.
///
/// It runs to its end also when this is dropped: half a dump would leave tracing half undone.
///
/// # Errors
/// [`Error::Start`], and [`Error::Failed`] with the runtime's last words.
pub async fn run(
    program: &Path,
    invocation: &Invocation,
    environment: BTreeMap<String, PathBuf>,
) -> Result<()> {
    let output = Command::new(program)
        .args(invocation.arguments())
        .envs(environment)
        .stdin(Stdio::null())
        .output()
        .await
        .map_err(|source| Error::Start {
            program: program.to_owned(),
            source,
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim();
    let from = said.len().saturating_sub(MOST_WORDS);
    let from = said.ceil_char_boundary(from);
    Err(Error::Failed {
        program: program.display().to_string(),
        status: output.status.to_string(),
        said: said[from..].to_owned(),
    })
}
