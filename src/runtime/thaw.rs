//! A process that does nothing but see to it that a container goes on.
//!
//! For a round of memory livemig freezes the container's cgroup, and CRIU, which has found it frozen, leaves
//! it so (`freezer_restore_state` in CRIU's `criu/seize.c`). livemig thaws it. If livemig dies, or gives up,
//! in just that moment, CRIU goes on, and at its end nobody would be there to thaw what it leaves: a container
//! that only was to be copied would stand still until somebody calls for `livemig recover`. So this process
//! is started before the cgroup is frozen. It waits until livemig has no more use for it, or has died; then
//! until CRIU has ended, before which a thaw could be undone again; and thaws.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::companion::{Companion, process};
use super::{Error, Result};
use crate::Config;
use crate::criu::Freezer;
use crate::podman::ContainerId;

/// The name that livemig is called by for this.
pub(crate) const NAME: &str = "livemig-thaw";

/// Thaws a container, at the latest when this has gone and CRIU has ended.
#[derive(Debug)]
pub struct Thaw(Companion);

impl Thaw {
    /// Starts the process, for a container that is about to be frozen for the process `criu`.
    ///
    /// # Errors
    /// [`Error::Start`].
    pub fn start(
        config: &Config,
        container: &ContainerId,
        freezer: &Freezer,
        criu: u32,
    ) -> Result<Thaw> {
        let freezer = serde_json::to_string(freezer).map_err(|error| Error::Start {
            program: NAME.into(),
            source: error.into(),
        })?;
        let arguments = [container.as_str(), &criu.to_string(), &freezer];
        Companion::start(config, NAME, arguments).map(Thaw)
    }

    /// Has it do its work, and waits until it is done: from then on it thaws nothing any more.
    ///
    /// # Errors
    /// [`Error::Failed`] if it could not.
    pub async fn done(self) -> Result<()> {
        let status = self.0.end().await?;
        match status.success() {
            true => Ok(()),
            false => Err(Error::Failed {
                program: NAME.to_owned(),
                status: status.to_string(),
                said: "the container may still be frozen".to_owned(),
            }),
        }
    }
}

/// What that process does.
pub(super) fn run(arguments: &[OsString]) -> ExitCode {
    let text: Vec<&str> = arguments.iter().filter_map(|text| text.to_str()).collect();
    let [_container, criu, freezer] = text[..] else {
        return ExitCode::FAILURE;
    };
    let (Ok(criu), Ok(freezer)) = (criu.parse(), serde_json::from_str(freezer)) else {
        return ExitCode::FAILURE;
    };
    match wait_and_thaw(io::stdin(), criu, &freezer) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Waits for the end of what `open` reads, then for that of CRIU, and thaws.
fn wait_and_thaw(mut open: impl Read, criu: u32, freezer: &Freezer) -> io::Result<()> {
    // Before anything else: as long as livemig is there, so is what it has told the number of.
    let criu = match process(criu) {
        Ok(criu) => Some(criu),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::SRCH) => None,
        Err(error) => return Err(error),
    };
    // Nobody writes anything: that there is no more to read is all.
    let waited = io::copy(&mut open, &mut io::sink()).map(|_| ());
    let ended = criu.as_ref().map_or(Ok(()), ended);
    // Also where it could not be waited for.
    freezer.thaw().map_err(io::Error::other)?;
    waited.and(ended)
}

/// Waits until this process has ended: its descriptor can be read from then on (pidfd_open(2)).
fn ended(process: &OwnedFd) -> io::Result<()> {
    let mut process = [PollFd::new(process, PollFlags::IN)];
    rustix::io::retry_on_intr(|| poll(&mut process, None))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::{Child, Command, Stdio};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// A frozen cgroup, as a file.
    fn frozen(directory: &Path) -> Freezer {
        std::fs::write(directory.join("cgroup.freeze"), "1").unwrap();
        let text = serde_json::json!({ "path": directory, "kind": "unified" });
        serde_json::from_value(text).unwrap()
    }

    fn is_frozen(directory: &Path) -> bool {
        std::fs::read_to_string(directory.join("cgroup.freeze")).unwrap() == "1"
    }

    /// Something that lives until it is ended.
    fn program() -> Child {
        Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    #[test]
    fn it_is_thawed_when_livemig_and_criu_have_gone_and_not_before() {
        let directory = tempfile::tempdir().unwrap();
        let freezer = frozen(directory.path());
        let mut criu = program();
        let pid = criu.id();
        let (livemig, open) = io::pipe().map(|(read, write)| (write, read)).unwrap();
        let (done, is_done) = mpsc::channel();
        std::thread::spawn(move || done.send(wait_and_thaw(open, pid, &freezer)));
        let not_yet = Duration::from_millis(50);
        assert!(is_done.recv_timeout(not_yet).is_err());
        // livemig has gone; what CRIU is at work on it would freeze again.
        drop(livemig);
        assert!(is_done.recv_timeout(not_yet).is_err());
        assert!(is_frozen(directory.path()));
        criu.kill().unwrap();
        criu.wait().unwrap();
        is_done.recv().unwrap().unwrap();
        assert!(!is_frozen(directory.path()));
    }

    #[test]
    fn a_criu_that_has_ended_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let freezer = frozen(directory.path());
        let mut criu = program();
        criu.kill().unwrap();
        criu.wait().unwrap();
        wait_and_thaw(io::empty(), criu.id(), &freezer).unwrap();
        assert!(!is_frozen(directory.path()));
    }
}
