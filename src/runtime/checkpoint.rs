//! Taking a container's state with the real runtime, as Podman would have it done.
//!
//! The arguments are those with which Podman itself called for the checkpoint ([`super::rendezvous`]), so
//! that whatever it has the runtime do differently for this container is done; only where the images go
//! is changed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;

use super::{Error, Invocation, Result};

/// Of what the runtime says no more than this is passed on, in bytes.
const MOST_WORDS: usize = 4 << 10;

/// A checkpoint that is under way.
#[derive(Debug)]
pub struct Checkpoint {
    program: PathBuf,
    process: tokio::process::Child,
}

impl Checkpoint {
    /// Starts the real runtime.
    ///
    /// It runs to its end also when this is dropped: half a dump would leave tracing half undone.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn start(
        program: &Path,
        invocation: &Invocation,
        environment: BTreeMap<String, PathBuf>,
    ) -> Result<Checkpoint> {
        let process = Command::new(program)
            .args(invocation.arguments())
            .envs(environment)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            // A terminal's Ctrl-C is for livemig: it would end CRIU in the midst of a process of the
            // container.
            .process_group(0)
            .spawn()
            .map_err(|source| Error::Start {
                program: program.to_owned(),
                source,
            })?;
        Ok(Checkpoint {
            program: program.to_owned(),
            process,
        })
    }

    /// Waits until it has ended, well or not.
    ///
    /// # Errors
    /// When that cannot be found out.
    pub async fn exited(&mut self) -> Result<()> {
        self.process.wait().await.map_err(Error::Lost)?;
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`Error::Failed`] with the runtime's last words.
    pub async fn ended(self) -> Result<()> {
        let output = self.process.wait_with_output().await;
        let output = output.map_err(Error::Lost)?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim();
        let from = said.ceil_char_boundary(said.len().saturating_sub(MOST_WORDS));
        Err(Error::Failed {
            program: self.program.display().to_string(),
            status: output.status.to_string(),
            said: said[from..].to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_terminal_sends_to_livemig_does_not_reach_it() {
        let id = "3acb922cdf168ab56da23193fe9cba1f240ee420e6f60b79f2eaf39a506b3a62";
        let text = [
            "-c",
            "cut -d ' ' -f 1,5 /proc/$$/stat >&2; false",
            "checkpoint",
            id,
        ];
        let arguments: Vec<String> = text.iter().map(|text| (*text).to_owned()).collect();
        let call = Invocation::read(&arguments).unwrap();
        let runtime = Checkpoint::start(Path::new("/bin/sh"), &call, BTreeMap::new()).unwrap();
        let Err(Error::Failed { said, .. }) = runtime.ended().await else {
            panic!("it does not fail");
        };
        // A group of its own has the number of its first process.
        let (process, group) = said.split_once(' ').unwrap();
        assert_eq!(process, group);
    }
}
